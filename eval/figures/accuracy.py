"""Accuracy task by task, a bar a model (the paper's Figure 3)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.drawing import INK, MUTED, PAPER, WIDE, add_legend, model_colours, stage_of, styled, tell

BAR = {"wide": 0.105, "narrow": 0.085}
"""Inches that a bar must have at least, on a page and on a phone."""


@styled
def by_task(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Bars of every task in panels of as many as fit, from `eval.frames.task_frame`, with one standard error.

    A model that was trained further is hatched in its stage's colour; one that was not measured leaves a gap.
    """
    tasks, models = list(dict.fromkeys(frame["task"])), list(dict.fromkeys(frame["model"]))
    colours = model_colours(models)
    room = width - 0.7
    fit = max(1, int(room / (BAR["wide" if width > 6 else "narrow"] * (len(models) + 1.5))))
    lines = math.ceil(len(tasks) / fit)
    per_line = math.ceil(len(tasks) / lines)
    figure = Figure(figsize=(width, 0.6 + 1.75 * lines), layout="constrained")
    bar = 0.84 / len(models)
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        here = tasks[line * per_line : (line + 1) * per_line]
        for _, row in frame[frame["task"].isin(here) & frame["value"].notna()].iterrows():
            place = here.index(row["task"]) - 0.42 + bar * (models.index(row["model"]) + 0.5)
            value, error = 100 * row["value"], 100 * row["stderr"]
            (patch,) = axes.bar(place, value, width=0.9 * bar, color=colours[row["model"]], **_style(row["model"]))
            tell(patch, _told(row))
            if error >= 0:
                axes.errorbar(place, value, yerr=error, color=MUTED, lw=1, capsize=1.8, capthick=1)
        axes.set(xlim=(-0.5, per_line - 0.5), ylim=(0, 104), ylabel="accuracy (%)")
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xticks(range(len(here)), [task.replace("_", "_\n", 1) if len(task) > 11 else task for task in here])
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(False, axis="x")
        axes.axhline(0, color=MUTED, lw=0.8)
    shown = [model for model in models if frame.loc[frame["model"] == model, "value"].notna().any()]
    add_legend(figure, [Patch(fc=colours[model], label=model, **_style(model)) for model in shown], width)
    return figure


def _style(model: str) -> dict[str, Any]:
    """How the bars of a model are filled: hatched where it was trained further."""
    return {"hatch": "////", "ec": PAPER, "lw": 0} if stage_of(model) != model else {"lw": 0}


def _told(row: pd.Series[Any]) -> str:
    """A bar's values in words: what was measured, its error, how many questions, how many were cut off."""
    error = f" ± {100 * row['stderr']:.1f}" if row["stderr"] >= 0 else ""
    asked = f", {row['n']:,.0f} questions" if row["n"] > 0 else ""
    cut = f", {row['truncated']:,.0f} generations cut off" if row["truncated"] > 0 else ""
    cut += f", {row['empty']:,.0f} empty" if row["empty"] > 0 else ""
    samples = f", mean of {row['samples']:.0f} samples" if row["samples"] > 1 else ""
    return f"{row['model']}, {row['task']}: {100 * row['value']:.1f}{error} %{asked}{samples}{cut}"
