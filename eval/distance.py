"""Accuracy by distance: how far an answer had to reach, model by model, from the records to the figure.

What a distance counts differs from family to family: `distill.data.families.DISTANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distill.data.families import DISTANCES
from eval.drawing import GRID, INK, MUTED, STAGE_RAMP, WIDE, styled, tell
from eval.runs import Run

COLUMNS = ["stage", "name", "task", "distance", "value", "stderr", "n", "low", "high"]
MOST = 16
"""Columns a task may have in the figure; where it has more distances, neighbours share one."""
CELL, ROW, LINE, GAP = (0.22, 0.42), 0.24, 0.17, 0.16
"""Inches: least and largest width of a cell, heights of a row and of a line of text, space between tasks."""
LOST = STAGE_RAMP[3]


def wilson(value: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval (95%) of a fraction ``value`` of ``count`` questions: at 0 and 1 too it has a width."""
    middle = value + z * z / (2 * count)
    half = z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)  # against rounding at 0 and 1


def distance_frame(run: Run) -> pd.DataFrame:
    """A row for every model, task and distance measured: stage, name, task, distance, value, stderr, n and the
    Wilson interval low, high. Accuracies are fractions."""
    measures = [(0, "teacher", run.teacher), *((s.index, s.name, s.records["measure"]) for s in run.models)]
    rows = []
    for stage, name, measure in measures:
        for row in (measure or {}).get("by_distance") or []:
            low, high = wilson(row["value"], row["n"])
            rows.append({"stage": stage, "name": name, **row, "low": low, "high": high})
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def told(frame: pd.DataFrame) -> str:
    """What a distance is in each task of the frame, in words."""
    words = {"recall": "pairs that follow the one asked for"}
    tasks = [f"{words.get(task, DISTANCES.get(task, 'distance'))} ({task})" for task in frame["task"].unique()]
    return f" The distance is the number of {', '.join(tasks)}."


@styled
def by_distance(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """A table of cells for each task, models by distances, from `distance_frame`: per cent right, the shade deeper
    the more is wrong; under each column its number of questions."""
    tables = {str(task): _pooled(rows) for task, rows in frame.groupby("task", sort=False)}
    models = list(frame["name"].unique())
    label = 0.15 + 0.075 * max(map(len, models))
    room = width - label - 0.02
    cells = sum(len(table["distance"].unique()) for table in tables.values())
    cell = min(max((room - GAP * (len(tables) - 1)) / cells, CELL[0]), CELL[1])
    lines: list[list[str]] = [[]]
    x = 0.0
    for task, table in tables.items():
        wide = cell * len(table["distance"].unique())
        if lines[-1] and x + wide > room + 1e-6:
            lines.append([])
            x = 0.0
        lines[-1].append(task)
        x += wide + GAP
    tall = 4 * LINE + ROW * len(models)
    height = tall * len(lines) + 0.2 * (len(lines) - 1) + 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(height, 0))  # in inches, down the page
    for number, tasks in enumerate(lines):
        top, x = 0.05 + number * (tall + 0.2), label
        rows = [top + 3 * LINE + ROW * i for i in range(len(models))]
        for model, y in zip(models, rows, strict=True):
            axes.text(0.02, y + ROW / 2, model, va="center_baseline", fontsize=8.5)
        axes.text(0.02, rows[-1] + ROW + LINE / 2, "questions", va="center_baseline", fontsize=7, color=MUTED)
        for task in tasks:
            axes.text(x, top + LINE / 2, task, va="center_baseline", fontsize=8.5, weight="bold")
            what = DISTANCES.get(task, "distance")
            axes.text(x, top + 1.5 * LINE, what, va="center_baseline", fontsize=7.5, color=MUTED)
            x = _draw(axes, tables[task], models, x, cell, rows) + GAP
    return figure


def _draw(axes: Axes, table: pd.DataFrame, models: Sequence[str], x: float, cell: float, rows: list[float]) -> float:
    """Draw the cells of one task from ``x`` on; returns where they end."""
    at: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    found = {(row["name"], row["distance"]): row for row in table.to_dict("records")}
    for distance in sorted(table["distance"].unique()):
        axes.text(x + cell / 2, rows[0] - LINE / 2, f"{distance:.0f}", fontsize=7.5, color=MUTED, **at)
        for model, y in zip(models, rows, strict=True):
            row, teacher = found.get((model, distance)), found.get(("teacher", distance))
            corner, size = (x + 0.01, y + 0.01), (cell - 0.02, ROW - 0.02)
            if row and row["value"] < 1:
                axes.add_patch(Rectangle(corner, *size, fc=LOST, alpha=0.1 + 0.55 * (1 - row["value"]), lw=0))
            frame = axes.add_patch(Rectangle(corner, *size, fc="none", ec=GRID, lw=0.6))
            if row:
                told = f"{100 * row['value']:.1f} % of {row['n']:.0f}"
                interval = f"95% interval {100 * row['low']:.0f} to {100 * row['high']:.0f}"
                tell(frame, f"{model}, {row['task']}, distance {distance:.0f}: {told} ({interval})")
            apart = row and teacher and (row["high"] < teacher["low"] or row["low"] > teacher["high"])
            text, weight = f"{100 * row['value']:.0f}" if row else "-", "bold" if apart else "normal"
            axes.text(x + cell / 2, y + ROW / 2, text, fontsize=7, color=INK, weight=weight, **at)
        counts = [f"{n:.0f}" for n in sorted(table["n"][table["distance"] == distance].unique())]
        text = "-".join(dict.fromkeys([counts[0], counts[-1]]))
        axes.text(x + cell / 2, rows[-1] + ROW + LINE / 2, text, fontsize=6.5, color=MUTED, **at)
        x += cell
    return x


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a task with at most `MOST` distances: neighbours become one, named by the first of them."""
    distances = sorted(rows["distance"].unique())
    each = math.ceil(len(distances) / MOST)
    if each == 1:
        return rows
    first = {distance: distances[i - i % each] for i, distance in enumerate(distances)}
    sums = rows.assign(distance=rows["distance"].map(first), right=rows["value"] * rows["n"])
    sums = sums.groupby(["name", "task", "distance"], sort=False, as_index=False)[["right", "n"]].sum()
    sums["value"] = sums["right"] / sums["n"]
    sums[["low", "high"]] = [wilson(value, n) for value, n in zip(sums["value"], sums["n"], strict=True)]
    return sums
