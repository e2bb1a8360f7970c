"""Accuracy against throughput with error bars and the frontier (the paper's Figure 4), of one run or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.drawing import (
    EXTERNAL,
    INK,
    MUTED,
    PAPER,
    WIDE,
    add_legend,
    count,
    label_points,
    marker,
    model_colours,
    roomy_limits,
    run_colours,
    styled,
    tell,
)

TIMES, PLUS_MINUS = "\u00d7", "±"


@styled
def pareto(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Mean generative accuracy against throughput, from `eval.frames.stage_frame` or `eval.compare.joint_frame`.

    Where the frame has several runs (column ``run``), a colour is a run; ``external`` models are triangles. Bars are
    one standard error, and the quartiles of the speed where those were measured (``ratio_low``, ``ratio_high``).
    """
    known = frame.dropna(subset=["ratio", "generative"])
    runs = list(dict.fromkeys(known["run"])) if "run" in known else []
    xs, ys = known["ratio"], 100 * known["generative"]
    errors = 100 * known["generative_stderr"].fillna(0)
    figure = Figure(figsize=(width, 0.35 * width + 1.6 + 0.25 * bool(runs)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="decode throughput (times the teacher's)", ylabel="mean generative accuracy (%)")
    slow, fast = (known.get(column, xs).fillna(xs) for column in ("ratio_low", "ratio_high"))
    axes.set_xlim(*roomy_limits(slow.min(), fast.max(), 0.3 * xs.max(), after=1.45 if width > 6 else 1.85))
    axes.set_ylim(*roomy_limits((ys - errors).min(), (ys + errors).max(), 6))
    low, high = axes.get_ylim()
    axes.set_yticks(
        [
            t
            for t in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            if max(low, 0) <= t <= min(high, 100)
        ]
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(7 if width > 6 else 4, steps=[1, 2, 2.5, 5, 10]))
    stairs = _stairs(axes, known)
    colours = run_colours(runs) if runs else model_colours(frame["name"])
    labels, bars = [], list(zip(slow, fast, ys, strict=True))
    for (_, row), x, y, error in zip(known.iterrows(), xs, ys, errors, strict=True):
        teacher = row["stage"] == 0
        colour = INK if teacher else colours[row["run"] if runs else row["name"]]
        short = str(row.get("short", row["name"]))
        spread = (
            [[max(x - row["ratio_low"], 0)], [max(row["ratio_high"] - x, 0)]]
            if row.get("ratio_low", math.nan) > 0
            else None
        )
        axes.errorbar(x, y, yerr=error or None, xerr=spread, color=colour, lw=1.2, capsize=3)
        shape = "^" if row.get("run") == EXTERNAL else marker(short)
        face, size = colour if row["frontier"] else PAPER, 9 if shape == "o" else 8
        (point,) = axes.plot(x, y, shape, ms=size, mfc=face, mec=colour, mew=1.8, zorder=3)
        tell(point, _told(row))
        spent = f"{count(row['tokens'])} tokens" if row["tokens"] >= 0 else "tokens not measured"
        text = short if teacher or runs else f"{short}\n{spent}"
        labels.append((x, y, error, text, colour if runs and not teacher else INK))
    if runs:
        add_legend(figure, _legend(known, runs, colours), width)
    label_points(figure, axes, labels, stairs, bars)
    return figure


def _stairs(axes: Axes, known: pd.DataFrame) -> list[tuple[float, float]]:
    """Draw the frontier, from edge to edge; returns its corners (none where no row is on it)."""
    edge = known[known["frontier"]].sort_values("ratio")
    corners = list(zip(edge["ratio"], 100 * edge["generative"], strict=True))
    if not corners:
        return []
    corners = [(axes.get_xlim()[0], corners[0][1]), *corners, (corners[-1][0], axes.get_ylim()[0])]
    axes.step(*zip(*corners, strict=True), where="pre", color=MUTED, lw=1.1, ls=(0, (4, 2)))
    return corners


def _told(row: pd.Series[Any]) -> str:
    """A point's values in words."""
    error = f" {PLUS_MINUS} {100 * row['generative_stderr']:.1f}" if row["generative_stderr"] >= 0 else ""
    parts = [
        f"{row['name']}: {100 * row['generative']:.1f}{error} % accuracy",
        f"{row['ratio']:.2f}{TIMES} the teacher",
    ]
    if row["tokens_per_second"] > 0:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row["tokens"] > 0:
        parts.append(f"{count(row['tokens'])} training tokens")
    return ", ".join(parts) + (", on the frontier" if row["frontier"] else "")


def _legend(known: pd.DataFrame, runs: Sequence[str], colours: dict[str, str]) -> list[Artist]:
    """A mark for each run that has a hybrid here, and for models measured elsewhere."""
    hybrids = set(known.loc[known["stage"] != 0, "run"])
    return [
        Line2D([], [], ls="", marker="^" if run == EXTERNAL else "o", ms=7, color=colours[run], label=run)
        for run in runs
        if run in hybrids
    ]
