"""The tables of a report as rows of text: for the terminal, the page and the model card; and as frames for files."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from eval.distance import distance_frame
from eval.drawing import BYTES, count, fitting_unit
from eval.frames import (
    importance_frame,
    loss_frame,
    placement_frame,
    stage_frame,
    task_frame,
)
from eval.provenance import cost_frame, provenance_frame
from eval.runs import Run, tasks_of
from eval.speeds import memory_frame, prefill_frame, protocol_frame, throughput_frame
from eval.words import DASH, NOT_MEASURED, TIMES, duration, measured, percent, speed

TERMINAL = 100
"""Columns of a terminal that a table may fill before it is cut in two."""


def tables_of(run: Run, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """File name -> table, of those that have rows: what the page shows, in full precision."""
    tables = {
        "stages": frame,
        "tasks": task_frame(run),
        "by_distance": distance_frame(run),
        "placement": placement_frame(run),
        "importance": importance_frame(run),
        "training": loss_frame(run),
        "fine_tuning": loss_frame(run, tuned=True),
        "throughput": throughput_frame(run),
        "prefill": prefill_frame(run),
        "protocols": protocol_frame(run),
        "memory": memory_frame(run),
        "cost": cost_frame(run),
        "provenance": provenance_frame(run),
    }
    return {name: table for name, table in tables.items() if len(table)}


def table(run: Run) -> str:
    """The stage table for the terminal; where that is too narrow, the tasks above, means, speed and cost below."""
    tasks = tasks_of(run)
    rows = table_rows(stage_frame(run), tasks)
    whole, split = aligned(rows), 1 + len(tasks)
    if max(map(len, whole.splitlines())) <= TERMINAL:
        return whole
    accuracy, cost = [row[:split] for row in rows], [[row[0], *row[split:]] for row in rows]
    return f"{aligned(accuracy)}\n\n{aligned(cost)}"


def table_rows(frame: pd.DataFrame, tasks: dict[str, str]) -> list[list[str]]:
    """The stage table as text: a header, then a row for the teacher and each stage, trained further or not.

    A kind with one task only has no mean beside it.
    """
    kinds = {"generative": "mean generative", "multiple_choice": "mean choice"}
    kinds = {kind: title for kind, title in kinds.items() if list(tasks.values()).count(kind) > 1}
    scale, unit = fitting_unit((frame["kv_bytes"] + frame["state_bytes"]).max(), BYTES)
    header = ["model", *tasks, *kinds.values(), "tokens/s", "vs teacher", f"KV + state {unit}", "tokens", "min"]
    rows = [header]
    for _, row in frame.iterrows():
        rows.append(
            [
                str(row["name"]),
                *(percent(row[key], row[f"{key}_stderr"]) for key in [*tasks, *kinds]),
                *_speed_cells(row),
                measured(row["state_bytes"] / scale, f"{row['kv_bytes'] / scale:.1f} + {{:.1f}}"),
                *_cost_cells(row),
            ]
        )
    return rows


def joint_rows(frame: pd.DataFrame) -> list[list[str]]:
    """The table of several runs and models measured elsewhere: what they have in common."""
    rows = [["model", "blocks replaced", "mean generative", "tokens/s", "vs teacher", "tokens", "min"]]
    for _, row in frame.iterrows():
        known = row["replaced"] >= 0 and row["num_blocks"] > 0
        blocks = f"{row['replaced']:.0f} of {row['num_blocks']:.0f}" if known else DASH
        accuracy = percent(row["generative"], row["generative_stderr"])
        rows.append([str(row["name"]), blocks, accuracy, *_speed_cells(row), *_cost_cells(row)])
    return rows


def cost_rows(frame: pd.DataFrame) -> list[list[str]]:
    """What each model cost: tokens trained on, wall time of every step, their sum, device."""
    steps = [step for step in ("score", "place", "swap", "train", "merge", "measure") if step in set(frame["step"])]
    rows = [["model", "tokens", *steps, "in all", "device"]]
    for model, part in frame.groupby("model", sort=False):
        tokens, seconds = part["tokens"].max(), part.set_index("step")["seconds"]
        cells = [duration(seconds[step]) if step in seconds.index else DASH for step in steps]
        device = ", ".join(sorted(set(part["device"]) - {""})) or "not recorded"
        rows.append(
            [str(model), count(tokens) if tokens >= 0 else DASH, *cells, duration(float(part["seconds"].sum())), device]
        )
    whole = float(frame["seconds"].sum())
    rows.append(["all", count(frame["tokens"].sum()), *(DASH for _ in steps), duration(whole), ""])
    return rows


def protocol_rows(frame: pd.DataFrame) -> list[list[str]]:
    """1 token in, N out, a row a model and protocol: batch, speed and ratio to the teacher, and what of memory and
    roofline is known."""
    optional = {"predicted": "roofline_ratio", "memory": "memory_bytes", "of roofline": "roofline_fraction"}
    known = [title for title, column in optional.items() if frame[column].notna().any()]
    rows = [["model", "protocol", "batch", "tokens/s", "vs teacher", *known]]
    for _, row in frame.iterrows():
        scale, unit = fitting_unit(row["memory_bytes"], BYTES)
        teacher, equal = row["model"] == "teacher", math.isnan(row["memory_bytes"])
        cells = {
            "predicted": DASH if teacher else measured(row["roofline_ratio"], "{:.2f}" + TIMES),
            "memory": DASH if equal else f"{row['memory_bytes'] / scale:,.1f} {unit}",
            "of roofline": measured(row["roofline_fraction"], "{:.0%}"),
        }
        protocol = "equal batch" if row["protocol"].startswith("batch") else str(row["protocol"])
        ratio = DASH if teacher else measured(row["ratio"], "{:.2f}" + TIMES)
        line = [str(row["model"]), protocol, f"{row['batch']:,.0f}", speed(row["tokens_per_second"]), ratio]
        rows.append([*line, *(cells[title] for title in known)])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """`rows` as text in columns, the header broken at spaces and underscores where its words are long."""
    header, *body = rows
    room = [max([len(row[i]) for row in body]) for i in range(len(header))]
    words = [_broken(title, width) for title, width in zip(header, room, strict=True)]
    depth = max(map(len, words))
    above = [[""] * (depth - len(lines)) + lines for lines in words]
    head = [list(line) for line in zip(*above, strict=True)]
    widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([*map(line, head), "  ".join("-" * width for width in widths), *map(line, body)])


def _broken(title: str, width: int) -> list[str]:
    """`title` in lines of at most `width` characters where its words allow that."""
    lines: list[str] = []
    for word in title.replace("_", "_ ").split(" "):
        joined = lines[-1] + ("" if lines[-1].endswith("_") else " ") + word if lines else ""
        if joined and len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _speed_cells(row: pd.Series[Any]) -> list[str]:
    return [speed(row["tokens_per_second"]), measured(row["ratio"], "{:.2f}" + TIMES)]


def _cost_cells(row: pd.Series[Any]) -> list[str]:
    if row["stage"] == 0:
        return [DASH, DASH]
    minutes = DASH if row["stage"] < 0 else measured(row["minutes"], "{:,.1f}")
    return [count(row["tokens"]) if row["tokens"] >= 0 else NOT_MEASURED, minutes]
