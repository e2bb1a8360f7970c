"""The figures of a run: each function draws one from plain records and returns it as a matplotlib Figure.

`svg` makes of a figure inline SVG whose ink follows the page's light or dark scheme, `png` an image on white.
Figures take their width in inches, so that a narrow page gets a figure drawn for it and not a shrunken one.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from eval.pareto import Stage

WIDE, NARROW = 8.4, 4.4
"""Figure widths in inches, for a page and for a phone."""

INK, MUTED, GRID, PAPER = "#1f2431", "#5f6b7c", "#dfe3ea", "#fefefe"
"""Colours that `svg` turns into the page's variables; the others are legible on light and on dark."""

MIXERS = {
    "attention": "#8a93a3",
    "mamba1": "#17877a",
    "mamba2": "#3577cc",
    "gated_deltanet": "#8b8420",
    "kda": "#b0588f",
}
SPARE_MIXERS = ("#b5543c", "#6f6bd0", "#4f8f3c", "#a8742a")
EM_SPACE = "\u2003"  # a run of plain spaces would collapse in SVG
STAGE_RAMP = ("#7566d2", "#ad52b8", "#d24f86", "#dc6250", "#d1832b")

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
}
styled = matplotlib.style.context(["default", STYLE])
"""Decorator: draw in the house style, whatever matplotlib's settings are outside."""


def count(number: float) -> str:
    """A number of tokens or parameters in three digits: 640, 12.3K, 0.82M, 55.9B."""
    for unit, size, least in (("B", 1e9, 1e9), ("M", 1e6, 1e5), ("K", 1e3, 1e4)):
        if number >= least:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return f"{number:,.0f}"


def mixer_colours(mixers: Iterable[str]) -> dict[str, str]:
    """Mixer -> colour: a mixer that we know has always the same one."""
    spare = sorted(set(mixers) - MIXERS.keys())
    return MIXERS | {mixer: SPARE_MIXERS[i % len(SPARE_MIXERS)] for i, mixer in enumerate(spare)}


def model_colours(models: Iterable[str]) -> dict[str, str]:
    """Model -> colour: the teacher in ink, the hybrids in the order of their stages from cool to warm."""
    hybrids = [model for model in dict.fromkeys(models) if model != "teacher"]
    ramp = LinearSegmentedColormap.from_list("stages", STAGE_RAMP)
    last = max(len(hybrids) - 1, 1)
    return {"teacher": INK} | {model: to_hex(ramp(i / last)) for i, model in enumerate(hybrids)}


@styled
def pareto(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Mean generative accuracy against throughput, from `eval.pareto.stage_frame` (the paper's Figure 4)."""
    colours = model_colours(frame["name"])
    known = frame.dropna(subset=["tokens_per_second", "generative"])
    xs, ys = known["tokens_per_second"], 100 * known["generative"]
    errors = 100 * known["generative_stderr"].fillna(0)
    figure = Figure(figsize=(width, 0.35 * width + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="decode throughput (output tokens/s)", ylabel="mean generative accuracy (%)")
    axes.set_xlim(*_limits(xs.min(), xs.max(), 0.3 * xs.max(), after=1.45 if width > 6 else 1.85))
    axes.set_ylim(*_limits((ys - errors).min(), (ys + errors).max(), 6))
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in MaxNLocator(6).tick_values(low, high) if max(low, 0) <= t <= min(high, 100)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if width > 6 else 4))
    edge = known[known["frontier"]].sort_values("tokens_per_second")
    stairs = list(zip(edge["tokens_per_second"], 100 * edge["generative"], strict=True))
    stairs = [(axes.get_xlim()[0], stairs[0][1]), *stairs, (stairs[-1][0], axes.get_ylim()[0])]
    axes.step(*zip(*stairs, strict=True), where="pre", color=MUTED, lw=1.1, ls=(0, (4, 2)))
    labels = []
    for (_, row), x, y, error in zip(known.iterrows(), xs, ys, errors, strict=True):
        teacher, colour = row["name"] == "teacher", colours[row["name"]]
        axes.errorbar(x, y, yerr=error or None, color=colour, lw=1.2, capsize=3)
        face, shape, size = colour if row["frontier"] else PAPER, "D" if teacher else "o", 8 if teacher else 9
        axes.plot(x, y, shape, ms=size, mfc=face, mec=colour, mew=1.8, zorder=3)
        spent = f"{count(row['tokens'])} tokens" if row["tokens"] >= 0 else "tokens not measured"
        labels.append((x, y, error, "teacher" if teacher else f"{row['name']}\n{spent}"))
    _label_points(figure, axes, labels, stairs)
    return figure


@styled
def placement(stages: Sequence[Stage], width: float = WIDE) -> Figure:
    """A row per stage, a cell per block: its mixer by colour, and the stage that converted it by number."""
    rows = [(s.index, s.name, s.records["place"]["mixers"]) for s in stages if s.records["place"]]
    converted = {block: stage.index for stage in stages for block in stage.added}
    blocks = max(len(mixers) for _, _, mixers in rows)
    used = list(dict.fromkeys(mixer for _, _, mixers in rows for mixer in mixers))
    colours = mixer_colours(used)
    lines = math.ceil(blocks / max(1, int((width - 1) / 0.14)))
    per_line = math.ceil(blocks / lines)
    figure = Figure(figsize=(width, 0.55 + lines * (0.42 + 0.27 * len(rows))), layout="constrained")
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first = line * per_line
        for row, (_, _, mixers) in enumerate(rows):
            for block, mixer in list(enumerate(mixers))[first : first + per_line]:
                cell = Rectangle((block - 0.46, row - 0.42), 0.92, 0.84, fc=colours[mixer], lw=0)
                axes.add_patch(cell)
                if mixer != "attention" and block in converted:
                    new = converted[block] == rows[row][0]
                    style = {"weight": "bold" if new else "normal", "alpha": 1.0 if new else 0.75}
                    size = 8 if per_line <= (40 if width > 6 else 26) else 6.5
                    axes.text(
                        block,
                        row,
                        str(converted[block]),
                        color="white",
                        ha="center",
                        va="center_baseline",
                        fontsize=size,
                        **style,
                    )
        axes.set(xlim=(first - 0.5, first + per_line - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [name for _, name, _ in rows], color=INK)
        shown = range(first, min(first + per_line, blocks))
        axes.set_xticks([block for block in shown if per_line <= 20 or block % 5 == 0])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    _legend(figure, [Patch(color=colours[mixer], label=mixer) for mixer in used], width)
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
    _legend(figure, _chosen_legend(stage, "bar"), width)
    return figure


@styled
def mmr(stage: Stage, width: float = WIDE) -> Figure:
    """MIL-Mamba-replacement: loss and rank of each block at 0 and at all steps (the paper's Figure 2)."""
    scores = stage.records["score"] or {}
    columns = ["block", "loss_start", "loss_end"]
    blocks = pd.DataFrame(scores["blocks"]).reindex(columns=columns).astype(float).dropna()
    ranks = blocks[columns[1:]].rank(method="first").astype(int)
    heights = [_unit(blocks[column]) for column in columns[1:]]
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
        order, away, decimals = at.sort_values().index, 2 * side - 1, _decimals(blocks[column])
        for i, text_at in zip(order, _spread(list(at[order]), 0.17 / (height - 0.9)), strict=True):
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
    _legend(figure, _chosen_legend(stage, "line"), width)
    return figure


@styled
def loss(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Training loss of every stage over the tokens of its lineage, from `eval.pareto.loss_frame`."""
    colours = model_colours(frame["model"])
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
    axes.set(xlabel="training tokens along the lineage", ylabel="distillation loss")
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 6 else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.?0+(?=[BMK])", "", count(x))))
    handles: list[Artist] = [Line2D([], [], color=colours[m], label=m) for m in frame["model"].unique()]
    handles.append(Line2D([], [], color=INK, marker="o", mfc=PAPER, mew=1.4, ls="", label="held-out loss"))
    _legend(figure, handles, width)
    return figure


@styled
def decode_time(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Time of a decode step against context, a panel per batch, from `eval.pareto.throughput_frame`."""
    scale, unit = _scale(frame["step_seconds"].max(), {"s": 1.0, "ms": 1e-3, "µs": 1e-6})
    return _panels(frame, "step_seconds", scale, f"time of one decode step ({unit})", width)


@styled
def cache(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Bytes of the decoding cache against context, a panel per batch, from `eval.pareto.throughput_frame`."""
    units = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "bytes": 1.0}
    scale, unit = _scale(frame["cache_bytes"].max(), units)
    return _panels(frame, "cache_bytes", scale, f"cache ({unit})", width)


@styled
def svg(figure: Figure, name: str) -> str:
    """`figure` as inline SVG: no background, the page's fonts and ink, its own ids (by `name`), no date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text


@styled
def png(figure: Figure) -> bytes:
    """`figure` as a PNG on white, fine enough for print."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _panels(frame: pd.DataFrame, value: str, scale: float, label: str, width: float) -> Figure:
    frame = frame.dropna(subset=[value])
    colours = model_colours(frame["model"].sort_values(key=lambda names: names != "teacher", kind="stable"))
    batches = sorted(frame["batch"].unique())
    wide = min(len(batches), 2 if width > 6 else 1)
    tall = math.ceil(len(batches) / wide)
    figure = Figure(figsize=(width, 0.5 + 2.6 * tall), layout="constrained")
    panels = figure.subplots(tall, wide, squeeze=False).flatten()
    for axes, batch in zip(panels, batches, strict=False):
        here = frame[frame["batch"] == batch]
        for model, rows in here.groupby("model", sort=False):
            rows, style = rows.sort_values("context"), "D-" if model == "teacher" else "o-"
            axes.plot(rows["context"], rows[value] / scale, style, ms=4.5, color=colours[model], zorder=3)
            if f"{value}_low" in rows:
                low, high = rows[f"{value}_low"] / scale, rows[f"{value}_high"] / scale
                axes.fill_between(rows["context"], low, high, color=colours[model], alpha=0.18, lw=0)
        axes.set_xscale("log", base=2)
        contexts = sorted(here["context"].unique())
        axes.set_xticks(contexts[:: math.ceil(len(contexts) / 7)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e4 else f"{x / 1024:,.0f}K"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.set_title(f"batch {batch}", color=INK, weight="bold")
        axes.set(xlabel="context (tokens)", ylabel=label if axes.get_subplotspec().is_first_col() else "")
    for axes in panels[len(batches) :]:
        axes.set_visible(False)
    names = [name for name in colours if name in set(frame["model"])]
    _legend(figure, [Line2D([], [], color=colours[name], label=name) for name in names], width)
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], width: float) -> None:
    columns = max(1, int(width / 1.4))
    if figure.get_layout_engine() is None:
        figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.6)
    else:
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6)


def _chosen_colours(stage: Stage) -> dict[int, str]:
    """Block that this stage replaced -> the colour of its new mixer."""
    mixers = (stage.records["place"] or {}).get("mixers", [])
    colours = mixer_colours(mixers)
    return {block: colours[mixers[block]] for block in stage.added}


def _chosen_legend(stage: Stage, shape: str) -> list[Artist]:
    mixers = (stage.records["place"] or {}).get("mixers", [])
    colours = mixer_colours(mixers)
    new = {f"replaced by {mixers[block]} in this stage": colours[mixers[block]] for block in stage.added}
    entries = new | {"kept" if new else "not placed yet": MIXERS["attention"]}
    if shape == "bar":
        return [Patch(color=colour, label=label) for label, colour in entries.items()]
    return [Line2D([], [], marker="o", ms=4, color=colour, label=label) for label, colour in entries.items()]


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, float, str]], stairs: Sequence[Any]
) -> None:
    """Write each (x, y, error, text) beside its point, clear of labels, points, bars, stairs and axes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    place = axes.transData.transform
    taken = []
    for x, y, error, _ in labels:
        (px, low), (_, middle), (_, high) = place([(x, y - error), (x, y), (x, y + error)])
        taken.append(Bbox.from_extents(px - 5, low - 2, px + 5, high + 2))
        taken.append(Bbox.from_extents(px - 8, middle - 8, px + 8, middle + 8))
    corners = place(stairs)
    for (x0, y0), (x1, y1) in pairwise(corners):
        taken.append(Bbox.from_extents(x0 - 1, y1 - 1, x0 + 1, y0 + 1))
        taken.append(Bbox.from_extents(x0, y1 - 1, x1, y1 + 1))
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    align = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
    for x, y, _, text in labels:
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8.5, zorder=4)
        note.set_linespacing(1.25)
        choices = []
        for reach in (10, 13, 16, 21, 27, 35, 45, 60, 80):
            for dx, dy in sides:
                note.set(position=(dx * reach, dy * reach), ha=align[dx][0], va=align[dy][1])
                box = note.get_window_extent(renderer).padded(2)
                outside = box.width * box.height - _overlap(box, inside)
                clash = sum(_overlap(box, other) for other in taken)
                choices.append((10 * outside + clash, reach, dx, dy, box))
        _, reach, dx, dy, box = min(choices, key=lambda choice: choice[:2])
        note.set(position=(dx * reach, dy * reach), ha=align[dx][0], va=align[dy][1])
        taken.append(box)
        if reach > 16:
            arrow = {"arrowstyle": "-", "color": MUTED, "lw": 0.7, "shrinkA": 0, "shrinkB": 6}
            axes.annotate("", (x, y), (dx * reach, dy * reach), textcoords="offset points", arrowprops=arrow)


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both else 0.0


def _limits(low: float, high: float, least: float, after: float = 1.45) -> tuple[float, float]:
    """Axis limits around low..high, taken to span `least` or more, with room for labels (more at the end)."""
    half, middle = max(high - low, least) / 2, (low + high) / 2
    return middle - 1.45 * half, middle + after * half


def _unit(values: "pd.Series[float]") -> "pd.Series[float]":
    """`values` on 0..1, by their logarithms where they span more than a factor of 5."""
    if values.min() > 0 and values.max() > 5 * values.min():
        values = values.map(math.log)
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else values * 0 + 0.5


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions in 0..1, moved from the `wanted` ones just so far that `gap` lies between them."""
    at: list[float] = []
    for value in wanted:
        at.append(max(value, at[-1] + gap) if at else value)
    ceiling = 1.0
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling)
        ceiling = at[i] - gap
    return at


def _decimals(values: "pd.Series[float]") -> int:
    """Decimals that tell `values` apart and show the smallest with two digits."""
    sizes = [size for size in (values.max() - values.min(), values[values > 0].min()) if size > 0]
    return min(max(2 - math.floor(math.log10(size)) for size in sizes), 7) if sizes else 3


def _scale(largest: float, units: Mapping[str, float]) -> tuple[float, str]:
    """The first unit in which `largest` is at least 1 (else the last), and its name."""
    unit = next((unit for unit, size in units.items() if largest >= size), list(units)[-1])
    return units[unit], unit
