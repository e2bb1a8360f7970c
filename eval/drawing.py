"""How figures look: style, colours, output as SVG and PNG, and the placing of labels.

`svg` makes of a figure inline SVG whose ink follows the page's light or dark scheme, `png` an image on white.
"""

from __future__ import annotations

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
from matplotlib.transforms import Bbox

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
STAGE_RAMP = ("#7566d2", "#ad52b8", "#d24f86", "#dc6250", "#d1832b")
STEPS = {
    "score": "#8b8420",
    "place": "#4f8f3c",
    "swap": "#b0588f",
    "train": "#3577cc",
    "merge": "#6f6bd0",
    "measure": "#17877a",
}
RUNS = ("#3577cc", "#c8612d", "#17877a", "#ad52b8", "#8b8420", "#b0588f", "#6f6bd0", "#4f8f3c")
EXTERNAL = "measured elsewhere"
"""The run that models of a CSV are said to belong to."""
BYTES = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "bytes": 1.0}

TOLD = "value:"
"""Before the text of an artist that `tell` was called for, where SVG has its id."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.facecolor": "none",
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
    """Model -> colour: the teacher in ink, the hybrids in the order of their stages from cool to warm.

    A stage that was trained further keeps its colour.
    """
    hybrids = {model: stage_of(model) for model in models if model != "teacher"}
    stages = list(dict.fromkeys(hybrids.values()))
    ramp = LinearSegmentedColormap.from_list("stages", STAGE_RAMP)
    last = max(len(stages) - 1, 1)
    return {"teacher": INK} | {model: to_hex(ramp(stages.index(of) / last)) for model, of in hybrids.items()}


def run_colours(runs: Sequence[str]) -> dict[str, str]:
    """Run -> colour, in the order given; models measured elsewhere are grey."""
    own = [run for run in runs if run != EXTERNAL]
    return {run: RUNS[i % len(RUNS)] for i, run in enumerate(own)} | {EXTERNAL: MIXERS["attention"]}


def tell(artist: Artist, text: str) -> None:
    """Say what ``artist`` stands for: `svg` gives it that as a title, which the page shows on hover."""
    artist.set_gid(TOLD + " ".join(text.split()))


def stage_of(model: str) -> str:
    """The stage behind a name: ``H1-5/10`` of ``H1-5/10-SFT`` and of ``H1-5/10-Q8_0``, and of itself."""
    return re.sub(r"-[A-Z][A-Z0-9_]*$", "", model)


def marker(model: str) -> str:
    """A diamond for the teacher, a circle for a stage, a square for what was made of one (trained further, a GGUF)."""
    return "D" if model == "teacher" else "o" if stage_of(model) == model else "s"


@styled
def svg_file(figure: Figure) -> str:
    """`figure` as an SVG file on white, each value that was told as a title; no date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(rf"""<g id=(["']){TOLD}(.*?)\1>""", r'<g class="value"><title>\2</title>', text)


def inline(text: str, name: str) -> str:
    """An SVG file made part of a page: no background, the page's fonts and ink, its own ids (by `name`)."""
    text = re.sub(r'<style type="text/css">.*?</style>', "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)
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


def add_legend(figure: Figure, handles: Sequence[Artist], width: float) -> None:
    """A legend above the axes, in as many columns as the widest label leaves room for."""
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int((width - 0.3) / (0.55 + 0.075 * widest))))
    if figure.get_layout_engine() is None:
        figure.legend(handles=handles, loc="upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.6)
    else:
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6)


def label_points(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, float, str, str]],
    stairs: Sequence[Any],
    bars: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Write each (x, y, error, text, colour) beside its point, clear of labels, points, their bars up and down, `bars`
    across (from, to, y), stairs and axes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    canvas: Any = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    place = axes.transData.transform
    taken = []
    for x, y, error, *_ in labels:
        (px, low), (_, middle), (_, high) = place([(x, y - error), (x, y), (x, y + error)])
        taken.append(Bbox.from_extents(px - 5, low - 2, px + 5, high + 2))
        taken.append(Bbox.from_extents(px - 8, middle - 8, px + 8, middle + 8))
    for left, right, y in bars:
        (x0, middle), (x1, _) = place([(left, y), (right, y)])
        taken.append(Bbox.from_extents(x0 - 2, middle - 5, x1 + 2, middle + 5))
    corners = place(stairs)
    for (x0, y0), (x1, y1) in pairwise(corners):
        taken.append(Bbox.from_extents(x0 - 1, y1 - 1, x0 + 1, y0 + 1))
        taken.append(Bbox.from_extents(x0, y1 - 1, x1, y1 + 1))
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    align = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
    for x, y, _, text, colour in labels:
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8.5, zorder=4, color=colour)
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


def roomy_limits(low: float, high: float, least: float, after: float = 1.45) -> tuple[float, float]:
    """Axis limits around low..high, taken to span `least` or more, with room for labels (more at the end)."""
    half, middle = max(high - low, least) / 2, (low + high) / 2
    return middle - 1.45 * half, middle + after * half


def on_unit_scale(values: pd.Series[float]) -> pd.Series[float]:
    """`values` on 0..1, by their logarithms where they span more than a factor of 5."""
    if values.min() > 0 and values.max() > 5 * values.min():
        values = values.map(math.log)
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else values * 0 + 0.5


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions in 0..1, moved from the `wanted` ones just so far that `gap` lies between them."""
    at: list[float] = []
    for value in wanted:
        at.append(max(value, at[-1] + gap) if at else value)
    ceiling = 1.0
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling)
        ceiling = at[i] - gap
    return at


def decimals_for(values: pd.Series[float]) -> int:
    """Decimals that tell `values` apart and show the smallest with two digits."""
    sizes = [size for size in (values.max() - values.min(), values[values > 0].min()) if size > 0]
    return min(max(2 - math.floor(math.log10(size)) for size in sizes), 7) if sizes else 3


def fitting_unit(largest: float, units: Mapping[str, float]) -> tuple[float, str]:
    """The first unit in which `largest` is at least 1 (else the last), and its name."""
    unit = next((unit for unit, size in units.items() if largest >= size), list(units)[-1])
    return units[unit], unit
