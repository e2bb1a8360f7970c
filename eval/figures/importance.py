"""Importance of blocks: leave-one-out, MIL-Mamba-replacement, and how ranks change from stage to stage."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.drawing import (
    INK,
    MIXERS,
    MUTED,
    WIDE,
    add_legend,
    decimals_for,
    mixer_colours,
    on_unit_scale,
    spread,
    styled,
    tell,
)
from eval.runs import Stage

EM_SPACE = "\u2003"  # a run of plain spaces would collapse in SVG


@styled
def loo(stage: Stage, width: float = WIDE) -> Figure:
    """Leave-one-out importance of every block with its standard error (the paper's Figure 1); bars of any score."""
    scores = stage.records["score"] or {}
    blocks = pd.DataFrame(scores["blocks"]).reindex(columns=["block", "score", "stderr"]).astype(float)
    colours = _chosen_colours(stage)
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(
        blocks["block"],
        blocks["score"],
        width=0.76,
        color=[colours.get(int(block), MIXERS["attention"]) for block in blocks["block"]],
        yerr=blocks["stderr"].fillna(0) if blocks["stderr"].notna().any() else None,
        error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5 if len(blocks) <= 30 else 0},
    )
    for bar, (_, row) in zip(bars, blocks.iterrows(), strict=True):
        error = f" ± {row['stderr']:.4f}" if row["stderr"] >= 0 else ""
        tell(bar, f"block {row['block']:.0f}: importance {row['score']:.4f}{error}")
    axes.axhline(0, color=MUTED, lw=0.8)
    scorer = str(scores.get("scorer", "loo"))
    what = f"importance ({scores.get('metric', 'acc')} lost)" if scorer == "loo" else f"score ({scorer})"
    axes.set(xlabel="block", ylabel=what)
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
    told = pd.DataFrame(scores["blocks"]).reindex(columns=[*columns, "steps"]).astype(float)
    blocks = told[columns].dropna()
    stepped = told.dropna().astype({"block": int, "steps": int})
    last = dict(zip(stepped["block"], stepped["steps"], strict=True))
    dropped = {block for block, steps in last.items() if steps < scores.get("steps", 0)}
    ranks = blocks[columns[1:]].rank(method="first").astype(int)
    if dropped:
        further = told.loc[blocks.index].sort_values(["steps", "loss_end"], ascending=[False, True]).index
        ranks.loc[further, "loss_end"] = range(1, len(further) + 1)
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
        line["ls"] = "--" if block in dropped else "-"
        axes.plot([0, 1], [at[i] for at in heights], clip_on=False, **line)
        for side, (column, at) in enumerate(zip(columns[1:], heights, strict=True)):
            (dot,) = axes.plot(side, at[i], "o", ms=4, clip_on=False, **line)
            when = f"after {last.get(block, scores.get('steps', 'the last'))} steps" if side else "at 0 steps"
            tell(dot, f"block {block}: loss {blocks.loc[i, column]:.5g} {when}, rank {ranks.loc[i].iloc[side]}")
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
def ranks(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """The order of the blocks in the score of every stage, from `eval.frames.importance_frame`.

    The most important stands at the bottom, so that what is replaced leaves at the top and a line that rises or falls
    is a change of rank among the blocks that are left.
    """
    frame = frame.dropna(subset=["rank"])
    stages = list(dict.fromkeys(frame["stage"]))
    tallest = int(frame["rank"].max())
    size = 8 if tallest <= 26 else 6
    figure = Figure(figsize=(width, 0.8 + 0.024 * size * tallest), layout="constrained")
    axes = figure.subplots()
    placed = frame.assign(place=frame.groupby("stage")["rank"].transform("max") - frame["rank"] + 1)
    rows = {block: points.sort_values("stage") for block, points in placed.groupby("block")}
    moves = {block: points["place"].diff().abs().max() for block, points in rows.items()}
    most = {block for block, move in moves.items() if move >= 1 and move == max(moves.values())}
    for block, points in rows.items():
        xs = [stages.index(stage) for stage in points["stage"]]
        colour, heavy = (INK, 1.8) if block in most else (MIXERS["attention"], 1.0)
        axes.plot(xs, points["place"], color=colour, lw=heavy, zorder=2 + (block in most))
        for x, (_, row) in zip(xs, points.iterrows(), strict=True):
            chosen = bool(row["replaced"])
            face = mixer_colours([row["mixer"]])[row["mixer"]] if chosen else MIXERS["attention"]
            (dot,) = axes.plot(x, row["place"], "o", ms=1.75 * size, mfc=face, mec=face, zorder=4)
            scored = f"{row['name']} ({row['scorer']}): block {row['block']:.0f}, rank {row['rank']:.0f}"
            tell(dot, f"{scored}, score {row['score']:.4g}{', replaced' if chosen else ''}")
            at: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 0.85 * size, "zorder": 5}
            text = f"{row['block']:.0f}"
            axes.text(x, row["place"], text, color="white", weight="bold" if chosen else "normal", **at)
    names = [f"{part['name'].iloc[0]}\n{part['scorer'].iloc[0]}" for _, part in frame.groupby("stage", sort=False)]
    axes.set_xticks(range(len(stages)), names, color=INK)
    axes.set(xlim=(-0.3, len(stages) - 0.7), ylim=(0.3, tallest + 0.7))
    axes.set_yticks([1, tallest], ["most\nimportant", "least,\nreplaced\nfirst"])
    axes.tick_params(axis="x", length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    mixers = sorted(set(frame.loc[frame["replaced"], "mixer"]))
    marks = [(mixer_colours(mixers)[mixer], f"replaced by {mixer} in that stage") for mixer in mixers]
    marks.append((MIXERS["attention"], "kept"))
    handles: list[Artist] = [Line2D([], [], marker="o", ls="", ms=6, color=c, label=label) for c, label in marks]
    if most:
        handles.append(Line2D([], [], color=INK, lw=1.8, label="moved most"))
    add_legend(figure, handles, width)
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
