"""What a run's records say, as pandas frames: a row a model, a task, a step, a timed shape.

What has not been measured is NaN, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.pareto import on_frontier
from eval.runs import Record, Run, number, tasks_of


def stage_frame(run: Run) -> pd.DataFrame:
    """One row for the teacher, each stage and each model made of it by further training, NaN where not measured.

    Columns: stage, name, replaced, num_blocks, parameters, ``<task>`` and ``<task>_stderr`` for each task,
    generative, multiple_choice (means over the tasks of a kind) and their ``_stderr``, tokens_per_second,
    teacher_tokens_per_second, ratio, tokens (along the lineage), minutes, ratio_low and ratio_high (the ratio at the
    quartiles of its step times), kv_bytes and state_bytes (the cache of the whole batch at the largest batch and its
    longest context: cache_batch, cache_context), backend (what ran it: hf, or llama.cpp of a GGUF file), frontier.
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
        lines = lines.replace([math.inf, -math.inf], math.nan)  # a training that diverged
        lines = lines.groupby("step").last().sort_index()
        lines["tokens"] = lines["tokens"].interpolate(method="index") + begin
        end = float(lines["tokens"].max())
        frames.append(lines.reset_index().assign(model=stage.name))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["model", *columns])


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
    backend = {"backend": measure.get("backend", "hf")}
    return row | _spread(measure, headline, teacher) | _cache(measure, teacher=index == 0) | backend


def _spread(measure: Record, headline: Record, teacher: float) -> dict[str, float]:
    """The ratio of the headline at the quartiles of its step times, where the record tells them."""
    rows = [
        row
        for row in (measure.get("serving") or {}).get("one_in_n_out") or []
        if row["protocol"] == "equal_batch" and row["batch"] == headline.get("batch") and row["model"] != "teacher"
    ]
    found = rows[0] if rows and teacher > 0 else {}
    return {f"ratio_{end}": number(found, f"tokens_per_second_{end}") / teacher for end in ("low", "high")}


def _cache(measure: Record, teacher: bool) -> dict[str, float]:
    """Bytes of the cache at the largest batch and its longest context, of the teacher or of the hybrid beside it."""
    rows = [row for row in measure.get("throughput") or [] if (row["model"] == "teacher") == teacher]
    last: Record = max(rows, key=lambda row: (row["batch"], row["context"]), default={})
    keys = {"kv_bytes": "kv_bytes", "state_bytes": "state_bytes", "cache_batch": "batch", "cache_context": "context"}
    return {key: number(last, of) for key, of in keys.items()}


def task_frame(run: Run) -> pd.DataFrame:
    """A row for every model and task measured: stage, model, task, kind, metric, value, stderr, n, and where the
    record tells them ``samples`` (that the value is the mean of), ``truncated`` and ``empty`` generations."""
    columns = ["stage", "model", "task", "kind", "metric", "value", "stderr", "n", "samples", "truncated", "empty"]
    measures = [(0, "teacher", run.teacher), *((s.index, s.name, s.records["measure"]) for s in run.models)]
    rows = []
    for stage, model, measure in measures:
        found = {str(entry["task"]): entry for entry in reversed((measure or {}).get("accuracy") or [])}
        rows += [{**found[task], "stage": stage, "model": model} for task in tasks_of(run) if task in found]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    return frame.astype(dict.fromkeys(columns[5:], float))


def importance_frame(run: Run) -> pd.DataFrame:
    """A row for every block that a stage scored: stage, name, scorer, block, score, stderr, loss_start, loss_end,
    rank (1: the least important, replaced first), replaced (in this stage), mixer (that it got then).

    The rank is that of ``order`` in the record, where blocks that the score cannot tell apart are told apart by
    likelihood; of the scores where there is no order.
    """
    columns = ["stage", "name", "scorer", "block", "score", "stderr", "loss_start", "loss_end", "rank", "replaced"]
    frames = []
    for stage in run.stages:
        record = stage.records["score"]
        if not record or not record["blocks"]:
            continue
        frame = pd.DataFrame(record["blocks"]).reindex(columns=columns)
        frame = frame.astype(dict.fromkeys(("score", "stderr", "loss_start", "loss_end"), float))
        told = record.get("order")
        order = told if isinstance(told, list) and all(type(block) is int for block in told) else []
        if set(order) == set(frame["block"]):
            frame["rank"] = frame["block"].map({block: place for place, block in enumerate(order, start=1)})
        else:
            frame["rank"] = frame["score"].rank(method="first")
        mixers = (stage.records["place"] or {}).get("mixers", [])
        frame["replaced"] = frame["block"].isin(stage.added)
        frame["mixer"] = [mixers[block] if block < len(mixers) else "" for block in frame["block"].astype(int)]
        frames.append(frame.assign(stage=stage.index, name=stage.name, scorer=str(record.get("scorer", "score"))))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*columns, "mixer"])


def placement_frame(run: Run) -> pd.DataFrame:
    """A row for every stage and block: stage, name, block, mixer, added (in this stage)."""
    rows = [
        {"stage": s.index, "name": s.name, "block": block, "mixer": mixer, "added": block in s.added}
        for s in run.stages
        for block, mixer in enumerate((s.records["place"] or {}).get("mixers", []))
    ]
    return pd.DataFrame(rows).reindex(columns=["stage", "name", "block", "mixer", "added"])
