"""The figures of a run: each function draws one from plain records and returns it as a matplotlib Figure.

Figures take their width in inches, so that a narrow page gets a figure drawn for it and not a shrunken one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from eval.drawing import (
    BYTES,
    INK,
    MIXERS,
    MUTED,
    PAPER,
    WIDE,
    add_legend,
    count,
    decimals_for,
    fitting_unit,
    label_points,
    marker,
    mixer_colours,
    model_colours,
    on_unit_scale,
    roomy_limits,
    spread,
    stage_of,
    styled,
)
from eval.pareto import Stage, lineage_of

EM_SPACE = "\u2003"  # a run of plain spaces would collapse in SVG


@styled
def pareto(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Mean generative accuracy against throughput, from `eval.pareto.stage_frame` (the paper's Figure 4)."""
    colours = model_colours(frame["name"])
    known = frame.dropna(subset=["ratio", "generative"])
    xs, ys = known["ratio"], 100 * known["generative"]
    errors = 100 * known["generative_stderr"].fillna(0)
    figure = Figure(figsize=(width, 0.35 * width + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="decode throughput (times the teacher's)", ylabel="mean generative accuracy (%)")
    axes.set_xlim(*roomy_limits(xs.min(), xs.max(), 0.3 * xs.max(), after=1.45 if width > 6 else 1.85))
    axes.set_ylim(*roomy_limits((ys - errors).min(), (ys + errors).max(), 6))
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in MaxNLocator(6).tick_values(low, high) if max(low, 0) <= t <= min(high, 100)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if width > 6 else 4, steps=[1, 2, 2.5, 5, 10]))
    edge = known[known["frontier"]].sort_values("ratio")
    stairs = list(zip(edge["ratio"], 100 * edge["generative"], strict=True))
    stairs = [(axes.get_xlim()[0], stairs[0][1]), *stairs, (stairs[-1][0], axes.get_ylim()[0])]
    axes.step(*zip(*stairs, strict=True), where="pre", color=MUTED, lw=1.1, ls=(0, (4, 2)))
    labels = []
    for (_, row), x, y, error in zip(known.iterrows(), xs, ys, errors, strict=True):
        teacher, colour = row["name"] == "teacher", colours[row["name"]]
        axes.errorbar(x, y, yerr=error or None, color=colour, lw=1.2, capsize=3)
        face, shape = colour if row["frontier"] else PAPER, marker(row["name"])
        size = 9 if shape == "o" else 8
        axes.plot(x, y, shape, ms=size, mfc=face, mec=colour, mew=1.8, zorder=3)
        spent = f"{count(row['tokens'])} tokens" if row["tokens"] >= 0 else "tokens not measured"
        labels.append((x, y, error, "teacher" if teacher else f"{row['name']}\n{spent}"))
    label_points(figure, axes, labels, stairs)
    return figure


@styled
def placement(stages: Sequence[Stage], width: float = WIDE) -> Figure:
    """A row per stage, a cell per block: its mixer by colour, and the stage that converted it by number."""
    rows = [(s.index, s.name, s.records["place"]["mixers"]) for s in stages if s.records["place"]]
    converted = {
        s.index: {block: each.index for each, _ in lineage_of(stages, s) for block in each.added} for s in stages
    }
    blocks = max(len(mixers) for _, _, mixers in rows)
    used = list(dict.fromkeys(mixer for _, _, mixers in rows for mixer in mixers))
    colours = mixer_colours(used)
    lines = math.ceil(blocks / max(1, int((width - 1) / 0.14)))
    per_line = math.ceil(blocks / lines)
    size = 8 if per_line <= (40 if width > 6 else 26) else 6.5
    figure = Figure(figsize=(width, 0.55 + lines * (0.42 + 0.27 * len(rows))), layout="constrained")
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first = line * per_line
        for row, (index, _, mixers) in enumerate(rows):
            for block, mixer in list(enumerate(mixers))[first : first + per_line]:
                cell = Rectangle((block - 0.46, row - 0.42), 0.92, 0.84, fc=colours[mixer], lw=0)
                axes.add_patch(cell)
                if mixer != "attention" and block in converted[index]:
                    new = converted[index][block] == index
                    weight, alpha = ("bold", 1.0) if new else ("normal", 0.75)
                    at = {"ha": "center", "va": "center_baseline", "fontsize": size}
                    axes.text(block, row, str(converted[index][block]), color="white", weight=weight, alpha=alpha, **at)
        axes.set(xlim=(first - 0.5, first + per_line - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [name for _, name, _ in rows], color=INK)
        shown = range(first, min(first + per_line, blocks))
        axes.set_xticks([block for block in shown if per_line <= 20 or block % 5 == 0])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    add_legend(figure, [Patch(color=colours[mixer], label=mixer) for mixer in used], width)
    return figure


@styled
def loo(stage: Stage, width: float = WIDE) -> Figure:
    """Leave-one-out importance of every block with its standard error (the paper's Figure 1)."""
    scores = stage.records["score"] or {}
    blocks = pd.DataFrame(scores["blocks"]).reindex(columns=["block", "score", "stderr"]).astype(float)
    colours = _chosen_colours(stage)
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        blocks["block"],
        blocks["score"],
        width=0.76,
        color=[colours.get(int(block), MIXERS["attention"]) for block in blocks["block"]],
        yerr=blocks["stderr"].fillna(0),
        error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5 if len(blocks) <= 30 else 0},
    )
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.set(xlabel="block", ylabel=f"importance ({scores.get('metric', 'acc')} lost)")
    axes.set_xticks([b for b in blocks["block"].astype(int) if len(blocks) <= 20 or b % 5 == 0])
    axes.tick_params(axis="x", length=0, pad=7)
    size = min(5.5, 36 * width / len(blocks))
    for block, colour in colours.items():  # a bar near zero shows no colour
        axes.plot(block, 0, "s", ms=size, color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlim(blocks["block"].min() - 0.6, blocks["block"].max() + 0.6)
    axes.grid(False, axis="x")
    add_legend(figure, _chosen_legend(stage, "bar"), width)
    return figure


@styled
def mmr(stage: Stage, width: float = WIDE) -> Figure:
    """MIL-Mamba-replacement: loss and rank of each block at 0 and at all steps (the paper's Figure 2)."""
    scores = stage.records["score"] or {}
    columns = ["block", "loss_start", "loss_end"]
    blocks = pd.DataFrame(scores["blocks"]).reindex(columns=columns).astype(float).dropna()
    ranks = blocks[columns[1:]].rank(method="first").astype(int)
    heights = [on_unit_scale(blocks[column]) for column in columns[1:]]
    colours = _chosen_colours(stage)
    height = 1.1 + 0.18 * max(len(blocks), 8)
    figure = Figure(figsize=(width, height))
    left, right = (1.6, 2.35) if width > 6 else (1.2, 1.95)
    word = "block " if width > 6 else ""
    axes = figure.add_axes((left / width, 0.1 / height, (width - left - right) / width, (height - 0.9) / height))
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    inch = 1 / (width - left - right)
    for i in blocks.index:
        block = int(blocks.loc[i, "block"])
        colour, chosen = colours.get(block, MIXERS["attention"]), block in colours
        line: dict[str, Any] = {"color": colour, "lw": 2.2 if chosen else 1.1, "zorder": 3 if chosen else 2}
        axes.plot([0, 1], [at[i] for at in heights], "o-", ms=4, clip_on=False, **line)
    for side, (column, at) in enumerate(zip(columns[1:], heights, strict=True)):
        order, away, decimals = at.sort_values().index, 2 * side - 1, decimals_for(blocks[column])
        for i, text_at in zip(order, spread(list(at[order]), 0.17 / (height - 0.9)), strict=True):
            block, (start, end) = int(blocks.loc[i, "block"]), ranks.loc[i]
            colour = colours.get(block, MIXERS["attention"])
            loss = f"{blocks.loc[i, column]:.{decimals}f}"
            moved = f"rank {end}" if start == end else f"rank {start} → {end}"
            label = f"{loss}{EM_SPACE}{word}{block}, {moved}" if side else f"{word}{block}{EM_SPACE}{loss}"
            ends = [side, side + 0.3 * away * inch]
            axes.plot(ends, [at[i], text_at], color=colour, lw=0.7, clip_on=False)
            ha, weight = ("left" if side else "right"), ("bold" if block in colours else "normal")
            axes.text(ends[1] + 0.05 * away * inch, text_at, label, ha=ha, va="center", fontsize=8, weight=weight)
    top = 1 + 0.22 / (height - 0.9)
    axes.text(0, top, "loss at 0 steps" if word else "block, loss at 0", ha="center", color=MUTED)
    axes.text(1, top, f"after {scores.get('steps', 'the last')} steps", ha="center", color=MUTED)
    add_legend(figure, _chosen_legend(stage, "line"), width)
    return figure


@styled
def loss(
    frame: pd.DataFrame, width: float = WIDE, label: str = "distillation loss", models: Sequence[str] = ()
) -> Figure:
    """Training loss of every model over the tokens of its lineage, from `eval.pareto.loss_frame`.

    `models` are those of the whole run, where colours must agree with other figures.
    """
    colours = model_colours([*models, *frame["model"]])
    figure = Figure(figsize=(width, 3.3), layout="constrained")
    axes = figure.subplots()
    for model in frame["model"].unique():
        lines = frame[frame["model"] == model]
        train, held_out = lines.dropna(subset=["loss"]), lines.dropna(subset=["eval_loss"])
        smooth = train["loss"].rolling(max(1, len(train) // 25), min_periods=1, center=True).mean()
        axes.plot(train["tokens"], train["loss"], color=colours[model], lw=0.7, alpha=0.35)
        axes.plot(train["tokens"], smooth, color=colours[model], label=model)
        axes.plot(held_out["tokens"], held_out["eval_loss"], "o", color=INK, mfc=PAPER, mew=1.4, zorder=3)
    values = pd.concat([frame["loss"], frame["eval_loss"]]).dropna()
    if values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else ""))
        axes.tick_params(axis="y", which="minor", length=0, labelcolor=MUTED)
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="training tokens along the lineage", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 6 else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.?0+(?=[BMK])", "", count(x))))
    handles: list[Artist] = [Line2D([], [], color=colours[m], label=m) for m in frame["model"].unique()]
    handles.append(Line2D([], [], color=INK, marker="o", mfc=PAPER, mew=1.4, ls="", label="held-out loss"))
    add_legend(figure, handles, width)
    return figure


@styled
def decode_time(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Time of a decode step against context, a panel per batch, from `eval.pareto.throughput_frame`."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    return _panels(frame, "step_seconds", units, "time of one decode step", width)


@styled
def cache(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Bytes of the decoding cache against context, a panel per batch, from `eval.pareto.throughput_frame`."""
    return _panels(frame, "cache_bytes", BYTES, "cache", width)


def _panels(frame: pd.DataFrame, value: str, units: Mapping[str, float], label: str, width: float) -> Figure:
    frame = frame.dropna(subset=[value])
    scale, unit = fitting_unit(frame[value].max(), units)
    colours = model_colours(frame["model"].sort_values(key=lambda names: names != "teacher", kind="stable"))
    batches = sorted(frame["batch"].unique())
    wide = min(len(batches), 2 if width > 6 else 1)
    tall = math.ceil(len(batches) / wide)
    figure = Figure(figsize=(width, 0.5 + 2.6 * tall), layout="constrained")
    panels = figure.subplots(tall, wide, squeeze=False).flatten()
    for axes, batch in zip(panels, batches, strict=False):
        here = frame[frame["batch"] == batch]
        for model, rows in here.groupby("model", sort=False):
            rows, style = rows.sort_values("context"), marker(model) + ("--" if stage_of(model) != model else "-")
            axes.plot(rows["context"], rows[value] / scale, style, ms=4.5, color=colours[model], zorder=3)
            if f"{value}_low" in rows:
                low, high = rows[f"{value}_low"] / scale, rows[f"{value}_high"] / scale
                axes.fill_between(rows["context"], low, high, color=colours[model], alpha=0.18, lw=0)
        axes.set_xscale("log", base=2)
        contexts = sorted(here["context"].unique())
        axes.set_xticks(contexts[:: math.ceil(len(contexts) / 7)])
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x / 1024:,.0f}K" if x % 1024 == 0 else f"{x:,.0f}")
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set_title(f"batch {batch}", color=INK, weight="bold")
        axes.set(xlabel="context (tokens)", ylabel=f"{label} ({unit})" if axes.get_subplotspec().is_first_col() else "")
    for axes in panels[len(batches) :]:
        axes.set_visible(False)
    names = [name for name in colours if name in set(frame["model"])]
    styles = {name: "--" if stage_of(name) != name else "-" for name in names}
    add_legend(figure, [Line2D([], [], color=colours[name], ls=styles[name], label=name) for name in names], width)
    return figure


def _chosen_colours(stage: Stage) -> dict[int, str]:
    """Block that this stage replaced -> the colour of its new mixer."""
    mixers = (stage.records["place"] or {}).get("mixers", [])
    colours = mixer_colours(mixers)
    return {block: colours[mixers[block]] for block in stage.added}


def _chosen_legend(stage: Stage, shape: str) -> list[Artist]:
    mixers = (stage.records["place"] or {}).get("mixers", [])
    new = {f"replaced by {mixers[block]} in this stage": colour for block, colour in _chosen_colours(stage).items()}
    entries = new | {"kept" if new else "not placed yet": MIXERS["attention"]}
    if shape == "bar":
        return [Patch(color=colour, label=label) for label, colour in entries.items()]
    return [Line2D([], [], marker="o", ms=4, color=colour, label=label) for label, colour in entries.items()]
