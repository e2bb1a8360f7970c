"""Decoding over context: tokens a second, and bytes that a model holds, a panel for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.drawing import (
    BYTES,
    INK,
    MUTED,
    PAPER,
    WIDE,
    add_legend,
    fitting_unit,
    marker,
    model_colours,
    stage_of,
    styled,
    tell,
)

TIMES = "\u00d7"
SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


@styled
def throughput(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Decoded tokens a second against context, from `eval.speeds.throughput_frame`; bands are quartiles."""
    frame = frame.dropna(subset=["step_seconds"])
    speeds = pd.DataFrame(
        {
            "value": frame["batch"] / frame["step_seconds"],
            "low": frame["batch"] / frame["step_seconds_high"],
            "high": frame["batch"] / frame["step_seconds_low"],
        }
    )
    return _panels(pd.concat([frame, speeds], axis=1), "decoded tokens/s", _speed_told, width)


@styled
def prefill(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Time to the first token against the length of the prompt, from `eval.speeds.prefill_frame`."""
    frame = frame.dropna(subset=["seconds"])
    scale, unit = fitting_unit(frame["seconds"].max(), SECONDS)
    values = {name: frame[f"seconds{end}"] / scale for name, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    return _panels(frame.assign(**values), f"time to the first token ({unit})", _prefill_told, width, "prompt")


@styled
def memory(frame: pd.DataFrame, width: float = WIDE) -> Figure:
    """Bytes against context, from `eval.speeds.memory_frame`: filled where measured, hollow where computed."""
    frame = frame.dropna(subset=["bytes"])
    scale, unit = fitting_unit(frame["bytes"].max(), BYTES)
    what = "memory" if frame["weight_bytes"].notna().any() else "cache"
    return _panels(frame.assign(value=frame["bytes"] / scale), f"{what} ({unit})", _memory_told, width)


def _panels(frame: pd.DataFrame, label: str, told: Callable[[Any], str], width: float, over: str = "context") -> Figure:
    """A panel a batch; columns model, batch, context, value and perhaps low, high (a band) and computed (hollow)."""
    colours = model_colours(frame["model"].sort_values(key=lambda names: names != "teacher", kind="stable"))
    batches = sorted(frame["batch"].unique())
    wide = min(len(batches), 2 if width > 6 else 1)
    tall = math.ceil(len(batches) / wide)
    figure = Figure(figsize=(width, 0.5 + 2.6 * tall), layout="constrained")
    panels = figure.subplots(tall, wide, squeeze=False).flatten()
    for axes, batch in zip(panels, batches, strict=False):
        here = frame[frame["batch"] == batch]
        for model, rows in here.groupby("model", sort=False):
            _line(axes, str(model), rows.sort_values("context"), colours[model], told)
        contexts = sorted(here["context"].unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(_apart(contexts, 7 if wide == 1 and width > 6 else 5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shorter(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
        axes.set_title(f"batch {batch:,.0f}", color=INK, weight="bold")
        axes.set(xlabel=f"{over} (tokens)", ylabel=label if axes.get_subplotspec().is_first_col() else "")
    for axes in panels[len(batches) :]:
        axes.set_visible(False)
    names = [name for name in colours if name in set(frame["model"])]
    styles = {name: "--" if stage_of(name) != name else "-" for name in names}
    handles: list[Artist] = [Line2D([], [], color=colours[name], ls=styles[name], label=name) for name in names]
    if "computed" in frame and frame["computed"].any():
        handles.append(Line2D([], [], color=MUTED, marker="o", mfc=PAPER, ls="", label="computed"))
    add_legend(figure, handles, width)
    return figure


def _line(axes: Axes, model: str, rows: pd.DataFrame, colour: str, told: Callable[[Any], str]) -> None:
    """One model's line over context, with a dot that says its value at each."""
    axes.plot(rows["context"], rows["value"], "--" if stage_of(model) != model else "-", color=colour, zorder=3)
    if "low" in rows:
        axes.fill_between(rows["context"], rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
    for _, row in rows.iterrows():
        face = PAPER if row.get("computed") else colour
        (dot,) = axes.plot(row["context"], row["value"], marker(model), ms=4.5, color=colour, mfc=face, zorder=4)
        tell(dot, f"{model}, batch {row['batch']:,.0f}, context {row['context']:,.0f}: {told(row)}")


def _speed_told(row: pd.Series[Any]) -> str:
    """The values of a timed shape in words."""
    scale, unit = fitting_unit(row["step_seconds"], SECONDS)
    low, high = row["step_seconds_low"] / scale, row["step_seconds_high"] / scale
    text = f"{row['value']:,.0f} tokens/s, {row['step_seconds'] / scale:.3g} {unit} a step"
    text += f" (quartiles {low:.3g} to {high:.3g})" if low > 0 else ""
    text += f", {row['ratio']:.2f}{TIMES} the teacher" if row["ratio"] > 0 and row["model"] != "teacher" else ""
    return text + (f", {row['roofline_fraction']:.0%} of the roofline" if row["roofline_fraction"] > 0 else "")


def _prefill_told(row: pd.Series[Any]) -> str:
    """The values of a timed prompt in words."""
    scale, unit = fitting_unit(row["seconds"], SECONDS)
    text = f"first token after {row['seconds'] / scale:.3g} {unit}"
    text += f", {row['batch'] * row['context'] / row['seconds']:,.0f} tokens/s"
    text += f", {row['ratio']:.2f}{TIMES} the teacher" if row["ratio"] > 0 and row["model"] != "teacher" else ""
    return text + (f", {row['roofline_fraction']:.0%} of the roofline" if row["roofline_fraction"] > 0 else "")


def _memory_told(row: pd.Series[Any]) -> str:
    """The bytes of a shape in words."""

    def sized(size: float) -> str:
        scale, unit = fitting_unit(size, BYTES)
        return f"{size / scale:,.4g} {unit}"

    named = {"weights": "weight_bytes", "keys and values": "kv_bytes", "states": "state_bytes"}
    named |= {"what a step needs beside them": "overhead_bytes"}
    parts = [f"{name} {sized(row[column])}" for name, column in named.items() if row[column] >= 0]
    return f"{sized(row['bytes'])}{' (computed)' if row['computed'] else ''}; {', '.join(parts)}"


def _apart(contexts: list[float], most: int) -> list[float]:
    """The contexts that get a tick: the longest, and before it those whose labels leave room, about ``most``."""
    span = math.log2(contexts[-1] / contexts[0]) if len(contexts) > 1 else 0
    kept = [contexts[-1]]
    for context in reversed(contexts[:-1]):
        if math.log2(kept[-1] / context) >= span / most:
            kept.append(context)
    return kept[::-1]


def shorter(number: float) -> str:
    """A context as a tick says it: 512, 4K, 128K."""
    return f"{number / 1024:,.0f}K" if number % 1024 == 0 else f"{number:,.0f}"
