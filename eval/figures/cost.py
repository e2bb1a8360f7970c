"""Wall time of every step, a bar a model."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.drawing import INK, STEPS, WIDE, add_legend, fitting_unit, styled, tell


@styled
def wall_time(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Stacked bars of the steps' wall time, a row a model, from `eval.provenance.cost_frame`."""
    known = frame[frame["seconds"] > 0]
    models, steps = list(dict.fromkeys(known["model"])), [step for step in STEPS if step in set(known["step"])]
    scale, unit = fitting_unit(known.groupby("model")["seconds"].sum().max(), {"h": 3600.0, "min": 60.0, "s": 1.0})
    figure = Figure(figsize=(width, 0.95 + 0.3 * len(models)), layout="constrained")
    axes = figure.subplots()
    reached = dict.fromkeys(models, 0.0)
    for step in steps:
        for _, row in known[known["step"] == step].iterrows():
            model, long = row["model"], row["seconds"] / scale
            (bar,) = axes.barh(models.index(model), long, left=reached[model], height=0.62, color=STEPS[step], lw=0)
            reached[model] += long
            tell(bar, f"{model}, {step}: {row['seconds']:,.1f} s")
    axes.set_yticks(range(len(models)), models, color=INK)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"wall time of the finished steps ({unit})")
    add_legend(figure, [Patch(color=STEPS[step], label=step) for step in steps], width)
    return figure
