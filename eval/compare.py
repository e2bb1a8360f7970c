"""Several runs and models measured elsewhere in one frame, what differs between the runs, and whether they compare."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from distill.config import MeasureConfig, RunConfig
from distill.errors import UserError
from eval.drawing import EXTERNAL
from eval.frames import stage_frame
from eval.pareto import on_frontier
from eval.provenance import measured_by, teacher_identity
from eval.runs import Run

PLACES = ("name", "run_dir", "slurm", "plan", "version", "threads", "tracking")
"""Keys of a config that say where and under which name a run is done, and nothing of what it is."""
ABSENT = "(absent)"


def read_labels(runs: Sequence[Run]) -> list[str]:
    """A name of its own for each run: what its config says, or its folder's, with as much of the path as it takes.

    Raises UserError where a run is given twice.
    """
    twice = [path for path, count in Counter(run.path for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice: name each run once")
    for labels in ([run.name for run in runs], [run.path.name for run in runs]):
        if len(set(labels)) == len(labels) and EXTERNAL not in labels:
            return labels
    parts = 2
    while True:
        labels = ["/".join(run.path.parts[-parts:]) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
        parts += 1


def joint_frame(runs: Sequence[Run], labels: Sequence[str], external: pd.DataFrame | None = None) -> pd.DataFrame:
    """`stage_frame` of every run in one, with run, short (the name within the run), and name (of its own).

    Runs of one teacher share its row; otherwise nothing is called the frontier, for ratios and accuracies are to
    different teachers. Models measured elsewhere come last.
    """
    frames = []
    for run, label in zip(runs, labels, strict=True):
        frame = stage_frame(run)
        frame = frame.assign(run=label, short=frame["name"])
        if len(runs) > 1:
            frame["name"] = [f"{label}: {name}" for name in frame["short"]]
        frames.append(frame)
    shared = len(runs) == 1 or not other_teachers(runs, labels)
    if shared:
        known = next((frame for frame in frames if frame["generative"].notna().iloc[0]), frames[0])
        teacher = known.iloc[:1].assign(name="teacher")
        frames = [teacher, *(frame.iloc[1:] for frame in frames)]
    if external is not None:
        frames.append(_external_rows(external, frames))
    joint = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    joint["frontier"] = on_frontier(joint) if shared else False
    return joint


def _external_rows(external: pd.DataFrame, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Models measured elsewhere as rows of a stage frame; speeds given in tokens a second against the teacher's."""
    taken = {name for frame in frames for name in frame["name"]}
    speeds = [frame["tokens_per_second"].iloc[0] for frame in frames if len(frame) and frame["stage"].iloc[0] == 0]
    teacher = speeds[0] if speeds else math.nan
    names = [f"{name} (external)" if name in taken else name for name in external["name"]]
    rows = pd.DataFrame({"stage": -1, "name": names, "short": names, "run": EXTERNAL})
    rows["generative"], rows["generative_stderr"] = external["accuracy"], external["accuracy_stderr"]
    rows["tokens_per_second"], rows["tokens"] = external["tokens_per_second"], external["tokens"]
    rows["ratio"] = external["ratio"].fillna(external["tokens_per_second"] / teacher)
    rows["frontier"] = False
    return rows.reindex(columns=frames[0].columns)


def other_teachers(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Why the runs' teachers are not known to be one, in words; empty where they are."""
    found = {label: teacher_identity(run) for run, label in zip(runs, labels, strict=True)}
    unknown = [label for label, identity in found.items() if not identity]
    if unknown:
        named = {str(run.config.get("teacher", "")) for run in runs}
        if len(named) == 1 and named != {""}:
            return ""  # nothing of it was measured yet, or before steps noted it
        return f"it is not known which teacher {' and '.join(unknown)} had"
    if len(set(found.values())) == 1:
        return ""
    names = ", ".join(f"{label}: {run.config.get('teacher', '?')}" for run, label in zip(runs, labels, strict=True))
    return f"they were distilled from different teachers ({names})"


def cautions(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Why figures of different runs cannot simply be set side by side; empty where they can."""
    lines = []
    if other := other_teachers(runs, labels):
        lines.append(
            f"These runs are not comparable: {other}. Accuracies and ratios stand each beside its own teacher; no "
            "frontier is drawn."
        )
    usual = _flat(asdict(MeasureConfig()))
    measures = [usual | _flat(measured_by(run)) for run in runs]
    keys = {key for one in measures for key in one} - {"allow_code_execution"}
    differing = sorted(key for key in keys if len({one.get(key, ABSENT) for one in measures}) > 1)
    if differing:
        lines.append(f"They were measured differently: measure.{', measure.'.join(differing)}.")
    return lines


def difference_frame(runs: Sequence[Run], labels: Sequence[str]) -> pd.DataFrame:
    """What differs between the runs' configs: a row a key, a column a run; where and under which name left out."""
    usual = _flat(asdict(RunConfig()))  # a run of before a key was there did what its default does
    configs = [usual | _flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key.split(".")[0] not in PLACES)
    rows = [
        [key, *(config.get(key, ABSENT) for config in configs)]
        for key in keys
        if len({config.get(key, ABSENT) for config in configs}) > 1
    ]
    return pd.DataFrame(rows, columns=["key", *labels])


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text, for every leaf of a mapping."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value if isinstance(value, str) else json.dumps(value, default=str)} if prefix else {}


def comparison_folder(runs: Sequence[Run]) -> Path:
    """Where a comparison goes if nothing else is asked for: in the first run, named after the others."""
    return runs[0].path / "report" / "-".join(["with", *(run.path.name for run in runs[1:])])
