"""A run folder as the report reads it: the records of its steps, its training logs, its config.

A run may be unfinished: what a step has not written yet is ``None``.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError
from distill.placement import tuned_name
from distill.records import read_json
from eval.wellformed import NUMBERS, problem, wrong_value

Record = Mapping[str, Any]

STEPS = {
    "score": "score/scores.json",
    "place": "place/placement.json",
    "train": "train/train.json",
    "measure": "measure/measure.json",
}
TUNING_STEPS = {"train": "train/train.json", "merge": "merge/merge.json", "measure": "measure/measure.json"}


@dataclass(frozen=True)
class Stage:
    """One H1-h/L of the schedule, or one trained further, with what its steps have written (``None``: not yet)."""

    index: int
    """Place in the schedule, from 1."""
    name: str
    """``H1-h/L``, or ``H1-h`` while L is not known; ``H1-h/L-SFT`` of one trained further."""
    records: Mapping[str, Record | None]
    """The record of each of `STEPS`, or of `TUNING_STEPS`."""
    log: tuple[Record, ...]
    """Lines of the training log, in the order they were written."""
    tuning: str = ""
    """What followed the distillation (``SFT``); empty for the stage itself."""
    steps: Mapping[str, Record] = field(default_factory=dict)
    """``step.json`` of each finished step: fingerprint, inputs, seconds, provenance."""

    @property
    def added(self) -> list[int]:
        """Blocks whose mixer this stage replaced; empty before the stage is placed."""
        return [int(block) for block in (self.records.get("place") or {}).get("added", [])]


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    path: Path
    config: Record
    teacher: Record | None
    stages: tuple[Stage, ...]
    """Stages of the schedule and any stage found on disk, in order."""
    tuned: tuple[Stage, ...] = ()
    """Stages trained further, in the order of their stages; each has its stage's index."""
    step: Record = field(default_factory=dict)
    """``step.json`` of the teacher's measure."""
    stored: tuple[Stage, ...] = ()
    """GGUF files of stages, measured through llama.cpp, in the order of their stages; each has its stage's index."""

    @property
    def name(self) -> str:
        """What the config calls the run; its folder's name where it says nothing."""
        return str(self.config.get("name", self.path.name))

    @property
    def models(self) -> list[Stage]:
        """Every stage, each followed by what was made of it by further training, and by its GGUF files."""
        return sorted([*self.stages, *self.tuned, *self.stored], key=lambda stage: stage.index)


def read_run(path: Path) -> Run:
    """Read the run folder `path`, finished or not.

    Raises UserError where `path` is no run folder or a record in it is broken.
    """
    if not any((path / part).exists() for part in ("run.yaml", "teacher", "stages")):
        raise UserError(
            f"{path} holds no records of a run (neither run.yaml nor teacher/ nor stages/): "
            "give the folder of a run, or do the run first"
        )
    path = path.resolve()  # "." has no name
    config = _read_config(path / "run.yaml")
    teacher = _read_record(path / "teacher" / "measure.json", "measure")
    schedule = config.get("schedule")
    planned = dict(enumerate(schedule if isinstance(schedule, list) else [], start=1))
    scheduled = {f"{index:02d}-H1-{replaced}" for index, replaced in planned.items()}
    folders = {
        int(folder.name.split("-")[0]): folder
        for folder in sorted((path / "stages").glob("[0-9]*-*"), key=lambda folder: folder.name in scheduled)
        if folder.is_dir() and folder.name.split("-")[0].isdigit()
    }  # where the schedule was changed, the folder that it names now wins
    suffix = f"/{teacher['num_blocks']}" if teacher and teacher.get("num_blocks") else ""
    stages, tuned, stored = [], [], []
    for index in sorted(folders.keys() | planned.keys()):
        folder = folders.get(index)
        records = {step: _read_record(folder / file, step) if folder else None for step, file in STEPS.items()}
        stem = folder.name.partition("-")[2] if folder else f"H1-{planned[index]}"
        named = (records["measure"] or {}).get("name") or (records["place"] or {}).get("name")
        log = _read_log(folder) if folder else ()
        stages.append(Stage(index, str(named or stem + suffix), records, log, steps=_read_steps(folder)))
        tuned += _read_tuned(path / "posttrain", folder.name, stages[-1]) if folder else []
        stored += _read_stored(path / "gguf", folder.name, stages[-1]) if folder else []
    return Run(path, config, teacher, tuple(stages), tuple(tuned), _read_step(path / "teacher"), tuple(stored))


def _read_tuned(parent: Path, folder: str, stage: Stage) -> list[Stage]:
    """What was made of the stage in ``folder`` by further training: `parent`/01-H1-5-SFT and the like."""
    found = []
    for path in sorted(parent.glob(f"{folder}-*")):
        tuning = path.name.removeprefix(f"{folder}-")
        if path.is_dir() and tuning.isalpha():
            records = {step: _read_record(path / file, step) for step, file in TUNING_STEPS.items()}
            name = (records["measure"] or {}).get("name") or tuned_name(stage.name, tuning)
            found.append(Stage(stage.index, str(name), records, _read_log(path), tuning, _read_steps(path)))
    return found


def _read_stored(parent: Path, folder: str, stage: Stage) -> list[Stage]:
    """The GGUF files of the stage in ``folder`` that were measured: `parent`/01-H1-5-Q8_0 and the like."""
    found = []
    for path in sorted(parent.glob(f"{folder}-*")):
        record = _read_record(path / "measure/measure.json", "measure")
        if record:
            kind = path.name.removeprefix(f"{folder}-")
            records = {"train": stage.records["train"], "measure": record}
            found.append(Stage(stage.index, str(record.get("name")), records, (), kind, _read_steps(path)))
    return found


def lineage_of(stages: Sequence[Stage], stage: Stage) -> list[tuple[Stage, float]]:
    """The stages of a run that led to `stage`, oldest first and itself last, each with the share of its training
    that counts: below 1 where the next one started from its middle.

    A record that does not say what it started from started from the stage before it.
    """
    found = [(stage, 1.0)]
    while True:
        stage = found[0][0]
        earlier = [each for each in stages if each.index < stage.index]
        given = (stage.records["train"] or {}).get("start", earlier[-1].name if earlier else "teacher")
        name, _, step = str(given).partition("@")
        source = next((each for each in earlier if each.name == name), None)
        if source is None:
            return found
        share = int(step) / number(source.records["train"] or {}, "steps") if step.isdigit() else 1.0
        found.insert(0, (source, share))


def tasks_of(run: Run) -> dict[str, str]:
    """Every task that any model was measured on -> its kind, in the order first met."""
    tasks: dict[str, str] = {}
    for measure in [run.teacher, *(model.records["measure"] for model in run.models)]:
        for entry in (measure or {}).get("accuracy") or []:
            tasks.setdefault(str(entry["task"]), str(entry["kind"]))
    return tasks


def number(record: Record, key: str) -> float:
    """`record[key]`, or NaN where it is absent or no number."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _read_record(file: Path, step: str) -> Record | None:
    if not file.is_file():
        return None
    remedy = f"remove {file.parent} and run its step again"
    try:
        record = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    broken = problem(step, record)
    if broken:
        raise UserError(f"{file} is broken, it holds {broken}; {remedy}")
    return record


def _read_log(stage: Path) -> tuple[Record, ...]:
    """The training log of a stage folder, also of a training that is still going on or was cut short."""
    files = [stage / step / "log.jsonl" for step in ("train", "train.partial")]
    file = next((file for file in files if file.is_file()), None)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = dict(json.loads(line))
            if wrong := wrong_value(record, numbers=(*NUMBERS, "loss")):
                raise UserError(f"{file}, line {number} is broken, it holds {wrong}: remove that line")
            records.append(record)
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):  # a torn last line is what a killed step leaves
                raise UserError(f"{file}, line {number} is not a JSON object: remove that line") from error
    return tuple(records)


def _read_steps(stage: Path | None) -> dict[str, Record]:
    """``step.json`` of every finished step of a stage folder, in the order of the steps."""
    folders = [stage / name for name in ("score", "place", "swap", "train", "merge", "measure")] if stage else []
    return {folder.name: record for folder in folders if (record := _read_step(folder))}


def _read_step(folder: Path) -> Record:
    file = folder / "step.json"
    if not file.is_file():
        return {}
    record = read_json(file)
    if not isinstance(record, dict):
        raise UserError(f"{file} is broken, it holds no object; remove {folder} and run its step again")
    return record


def _read_config(file: Path) -> Record:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected a mapping")
    return config
