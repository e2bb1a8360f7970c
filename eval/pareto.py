"""Records of a run folder -> pandas frames -> the Pareto frontier of accuracy against throughput.

A run may be unfinished. What a step has not written yet is ``None`` in `Run` and NaN in a frame, never zero.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
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

    @property
    def models(self) -> list[Stage]:
        """Every stage, each followed by what was made of it by further training."""
        return sorted([*self.stages, *self.tuned], key=lambda stage: stage.index)


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
    stages, tuned = [], []
    for index in sorted(folders.keys() | planned.keys()):
        folder = folders.get(index)
        records = {step: _read_record(folder / file, step) if folder else None for step, file in STEPS.items()}
        stem = folder.name.partition("-")[2] if folder else f"H1-{planned[index]}"
        named = (records["measure"] or {}).get("name") or (records["place"] or {}).get("name")
        log = _read_log(folder) if folder else ()
        stages.append(Stage(index, str(named or stem + suffix), records, log))
        tuned += _read_tuned(path / "posttrain", folder.name, stages[-1]) if folder else []
    return Run(path, config, teacher, tuple(stages), tuple(tuned))


def _read_tuned(parent: Path, folder: str, stage: Stage) -> list[Stage]:
    """What was made of the stage in ``folder`` by further training: `parent`/01-H1-5-SFT and the like."""
    found = []
    for path in sorted(parent.glob(f"{folder}-*")):
        tuning = path.name.removeprefix(f"{folder}-")
        if path.is_dir() and tuning.isalpha():
            records = {step: _read_record(path / file, step) for step, file in TUNING_STEPS.items()}
            name = (records["measure"] or {}).get("name") or tuned_name(stage.name, tuning)
            found.append(Stage(stage.index, str(name), records, _read_log(path), tuning))
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


def stage_frame(run: Run) -> pd.DataFrame:
    """One row for the teacher, each stage and each model made of it by further training, NaN where not measured.

    Columns: stage, name, replaced, num_blocks, parameters, ``<task>`` and ``<task>_stderr`` for each task,
    generative, multiple_choice (means over the tasks of a kind) and their ``_stderr``, tokens_per_second,
    teacher_tokens_per_second, ratio, tokens (along the lineage), minutes, kv_bytes and state_bytes (the cache of
    the whole batch at the largest batch and its longest context: cache_batch, cache_context), frontier.
    A mean stands only if every task of its kind was measured, so that means compare like with like. If a task
    has several metrics, the first one listed counts. Accuracies are fractions.
    """
    tasks = tasks_of(run)
    rows = [_row("teacher", 0, run.teacher, None, tasks)]
    rows += [_row(s.name, s.index, s.records["measure"], s.records["train"], tasks) for s in run.models]
    if math.isnan(rows[0]["tokens_per_second"]):  # the stages timed the teacher too
        rows[0]["tokens_per_second"] = float(pd.Series([r["teacher_tokens_per_second"] for r in rows]).median())
    measures = [run.teacher, *(stage.records["measure"] for stage in run.stages)]
    rows[0] |= _cache(next((measure for measure in measures if measure), {}), teacher=True)
    rows[0]["ratio"] = 1.0 if rows[0]["tokens_per_second"] > 0 else math.nan
    frame = pd.DataFrame(rows)
    frame["frontier"] = on_frontier(frame)
    return frame


def on_frontier(frame: pd.DataFrame, x: str = "ratio", y: str = "generative") -> "pd.Series[bool]":
    """Whether no other row is at least as good in both `x` and `y` and better in one; never with a NaN.

    Speed counts as the ratio to the teacher timed in the same run: tokens/s also vary with what else a machine does.
    """
    known = frame[[x, y]].dropna()

    def dominated(point: "pd.Series[float]") -> bool:
        no_worse = (known[x] >= point[x]) & (known[y] >= point[y])
        better = (known[x] > point[x]) | (known[y] > point[y])
        return bool((no_worse & better).any())

    best = [i in known.index and not dominated(known.loc[i]) for i in frame.index]
    return pd.Series(best, index=frame.index, dtype=bool)


def best_hybrid(frame: pd.DataFrame, keep: float = 0.95) -> "pd.Series[Any] | None":
    """The hybrid of the largest ratio that keeps `keep` of the teacher's mean generative accuracy, if any.

    Of a stage and what was made of it by further training, which are equally fast, the more accurate one counts.
    """
    floor = keep * frame["generative"].iloc[0]
    good = frame[(frame["stage"] > 0) & (frame["generative"] >= floor) & frame["ratio"].notna()]
    good = good.sort_values(["generative", "tokens"], ascending=[True, False]).groupby("stage").tail(1)
    return None if good.empty else good.sort_values("ratio", kind="stable").iloc[-1]


def loss_frame(run: Run, *, tuned: bool = False) -> pd.DataFrame:
    """Training curves of the stages (or, ``tuned``, of their fine-tunings).

    Columns: model, step, tokens (along the lineage), loss, eval_loss.
    A log line's ``tokens`` are those of its stage so far; a line without them is placed by interpolation.
    A step logged twice, as after a resumption, counts once, the last time.
    """
    columns = ["step", "tokens", "loss", "eval_loss"]
    frames, end = [], 0.0
    for stage in run.tuned if tuned else run.stages:
        if not stage.log:
            continue
        train, measure = stage.records["train"] or {}, stage.records["measure"] or {}
        spent, total = number(train, "tokens"), number(measure, "tokens")
        begin = total - spent if total >= spent else end  # NaN compares false
        zero = {"step": 0, "tokens": 0, "eval_loss": train.get("eval_loss_start")}
        lines = pd.DataFrame([zero, *stage.log]).reindex(columns=columns).astype(float)
        lines = lines.groupby("step").last().sort_index()
        lines["tokens"] = lines["tokens"].interpolate(method="index") + begin
        end = float(lines["tokens"].max())
        frames.append(lines.reset_index().assign(model=stage.name))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["model", *columns])


def throughput_frame(run: Run) -> pd.DataFrame:
    """Decode: model, batch, context, step_seconds and its quartiles (``_low``, ``_high``), cache_bytes.

    The teacher is measured beside every hybrid: its row is the median of those runs, its band spans them all.
    """
    values = {"step_seconds": "median", "cache_bytes": "median"}
    values |= {"step_seconds_low": "min", "step_seconds_high": "max"}
    keys = ["model", "batch", "context"]
    measures = [("teacher", run.teacher), *((model.name, model.records["measure"]) for model in run.models)]
    rows = [
        {**row, "model": "teacher" if row.get("model") == "teacher" else name}
        for name, measure in measures
        for row in (measure or {}).get("throughput") or []
    ]
    frame = pd.DataFrame(rows).reindex(columns=[*keys, *values])
    frame = frame.astype(dict.fromkeys(values, float))
    return frame.groupby(keys, sort=False, as_index=False).agg(values).sort_values(["batch", "context"])


def number(record: Record, key: str) -> float:
    """`record[key]`, or NaN where it is absent or no number."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _row(
    name: str, index: int, measure: Record | None, train: Record | None, tasks: Mapping[str, str]
) -> dict[str, Any]:
    measure = measure or {}
    headline = measure.get("headline") or {}
    row: dict[str, Any] = {"stage": index, "name": name}
    row |= {key: number(measure, key) for key in ("replaced", "num_blocks", "parameters")}
    found = {str(entry["task"]): entry for entry in reversed(measure.get("accuracy") or [])}
    for task in tasks:
        row[task] = number(found.get(task, {}), "value")
        row[f"{task}_stderr"] = number(found.get(task, {}), "stderr")
    for kind in ("generative", "multiple_choice"):
        names = [task for task, of in tasks.items() if of == kind]
        row[kind] = sum(row[t] for t in names) / len(names) if names else math.nan
        row[f"{kind}_stderr"] = math.hypot(*(row[f"{t}_stderr"] for t in names)) / len(names) if names else math.nan
    speed, teacher = number(headline, "tokens_per_second"), number(headline, "teacher_tokens_per_second")
    if index == 0 and math.isnan(speed):
        speed = teacher
    ratio = number(headline, "ratio")
    row |= {
        "tokens_per_second": speed,
        "teacher_tokens_per_second": teacher,
        "ratio": speed / teacher if math.isnan(ratio) and teacher > 0 else ratio,
        "tokens": number(measure, "tokens"),
        "minutes": number(measure, "minutes") if "minutes" in measure or not train else number(train, "minutes"),
    }
    return row | _cache(measure, teacher=index == 0)


def _cache(measure: Record, teacher: bool) -> dict[str, float]:
    """Bytes of the cache at the largest batch and its longest context, of the teacher or of the hybrid beside it."""
    rows = [row for row in measure.get("throughput") or [] if (row["model"] == "teacher") == teacher]
    last: Record = max(rows, key=lambda row: (row["batch"], row["context"]), default={})
    keys = {"kv_bytes": "kv_bytes", "state_bytes": "state_bytes", "cache_batch": "batch", "cache_context": "context"}
    return {key: number(last, of) for key, of in keys.items()}


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


def _read_config(file: Path) -> Record:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected a mapping")
    return config
