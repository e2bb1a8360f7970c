"""The picture of `benchmarks/mixers.py`: time over length, three panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.drawing import MIXERS, WIDE, png, styled

NAMES = {"mamba_ssm_ref": "mamba-ssm's reference", "transformers": "transformers' slow path"}
COLOURS = MIXERS | {"mamba_ssm_ref": "#b5543c", "transformers": "#a8742a"}


@styled
def draw(
    scans: Sequence[dict[str, Any]], mixers: Sequence[dict[str, Any]], decoding: Sequence[dict[str, Any]]
) -> bytes:
    """A PNG from the rows that `scans`, `mixers` and `decoding` give."""
    figure = Figure(figsize=(WIDE * 1.25, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    batch = max(row["batch"] for row in decoding)
    parts = (
        ("scan alone, forward + backward", scans, "length"),
        ("whole mixer, forward + backward", mixers, "length"),
        (f"whole mixer, decode step at batch {batch}", [row for row in decoding if row["batch"] == batch], "context"),
    )
    for axes, (title, rows, by) in zip(panels, parts, strict=True):
        axes.set(title=title, xlabel=f"{by} (tokens)", xscale="log", yscale="log")
        for name, colour in COLOURS.items():
            points = [(row[by], 1e3 * row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=NAMES.get(name, name), ms=3.5)
        axes.set_xticks([row[by] for row in rows][::2])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    panels[0].set_ylabel("ms")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=5, columnspacing=1.6)
    return png(figure)
