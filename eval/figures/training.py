"""Training curves over the tokens of a lineage."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.drawing import INK, MUTED, PAPER, WIDE, add_legend, count, model_colours, styled, tell


@styled
def loss(
    frame: pd.DataFrame, width: float = WIDE, label: str = "distillation loss", models: Sequence[str] = ()
) -> Figure:
    """Training loss of every model over the tokens of its lineage, from `eval.frames.loss_frame`.

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
        for tokens, value in zip(held_out["tokens"], held_out["eval_loss"], strict=True):
            (ring,) = axes.plot(tokens, value, "o", color=INK, mfc=PAPER, mew=1.4, zorder=3)
            tell(ring, f"{model}: held-out loss {value:.4f} at {count(tokens)} tokens")
    values = pd.concat([frame["loss"], frame["eval_loss"]]).dropna()
    if values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else ""))
        axes.tick_params(axis="y", which="minor", length=0, labelcolor=MUTED)
    else:
        axes.set_ylim(0, 1.08 * values.max())
    axes.set(xlabel="training tokens along the lineage", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 6 else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.?0+(?=[BMK])", "", count(x))))
    handles: list[Artist] = [Line2D([], [], color=colours[m], label=m) for m in frame["model"].unique()]
    handles.append(Line2D([], [], color=INK, marker="o", mfc=PAPER, mew=1.4, ls="", label="held-out loss"))
    add_legend(figure, handles, width)
    return figure
