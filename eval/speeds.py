"""What was timed and what it held in memory, as pandas frames; NaN where a record does not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from eval.runs import Record, Run, number

SHAPE = ["model", "batch", "context"]
TIMED = ["step_seconds", "step_seconds_low", "step_seconds_high", "roofline_fraction", "ratio"]
HELD = ["weights_bytes", "kv_bytes", "state_bytes", "cache_bytes", "peak_bytes"]
PROTOCOL = ["protocol", "model", "batch", "output_tokens", "tokens_per_second", "ratio", "bytes", "roofline_fraction"]


def _measures(run: Run) -> Iterator[tuple[str, Record]]:
    """Every measure with the model that it is of; the teacher is timed in each."""
    yield "teacher", run.teacher or {}
    for model in run.models:
        yield model.name, model.records["measure"] or {}


def _model(name: str, row: Record) -> str:
    """The model of an entry: a hybrid's record may call it by the name that it had then."""
    return "teacher" if row.get("model") == "teacher" else name


def throughput_frame(run: Run) -> pd.DataFrame:
    """Decode: model, batch, context, step_seconds and its quartiles (``_low``, ``_high``), roofline_fraction, and
    ratio, the speed over that of the teacher timed in the same run.

    The teacher is measured beside every hybrid: its row is the median of those runs, its band spans them all.
    """
    rows = []
    for name, measure in _measures(run):
        timed = measure.get("throughput") or []
        beside = [row for row in timed if row["model"] == "teacher"]
        shaped = {(row["batch"], row["context"]): number(row, "step_seconds") for row in beside}
        for row in timed:
            seconds, teacher = number(row, "step_seconds"), shaped.get((row["batch"], row["context"]), math.nan)
            rows.append({**row, "model": _model(name, row), "ratio": teacher / seconds if seconds > 0 else math.nan})
    frame = pd.DataFrame(rows).reindex(columns=[*SHAPE, *TIMED]).astype(dict.fromkeys(TIMED, float))
    how = dict.fromkeys(TIMED, "median") | {"step_seconds_low": "min", "step_seconds_high": "max"}
    return frame.groupby(SHAPE, sort=False, as_index=False).agg(how).sort_values(["batch", "context"])


def memory_frame(run: Run) -> pd.DataFrame:
    """Memory: model, batch, context, the bytes of `HELD`, computed (or measured), and bytes, what is drawn: weights
    and cache where the weights are told, else the cache.

    From the list ``memory`` of the records; of records without one, what the cache held where decoding was timed.
    """
    rows: list[dict[str, Any]] = []
    key = "memory" if any(measure.get("memory") for _, measure in _measures(run)) else "throughput"
    for name, row in ((name, row) for name, measure in _measures(run) for row in measure.get(key) or []):
        held = {key: number(row, key) for key in HELD}
        if math.isnan(held["cache_bytes"]):
            held["cache_bytes"] = held["kv_bytes"] + held["state_bytes"]
        shape = {"model": _model(name, row), "batch": row["batch"], "context": row["context"]}
        rows.append({**shape, **held, "computed": row.get("how") == "computed"})
    frame = pd.DataFrame(rows).reindex(columns=[*SHAPE, *HELD, "computed"])
    frame = frame.drop_duplicates(SHAPE, keep="last").reset_index(drop=True)
    whole = frame["weights_bytes"].notna().all() and len(frame) > 0
    frame["bytes"] = frame["cache_bytes"] + (frame["weights_bytes"] if whole else 0)
    return frame.astype({"bytes": float}).sort_values(["batch", "context"], kind="stable")


def protocol_frame(run: Run) -> pd.DataFrame:
    """1 token in, N out: a row for every protocol and model, the teacher's beside each hybrid's joined in one (the
    median), with columns `PROTOCOL`."""
    rows: list[dict[str, Any]] = []
    for model in run.models:
        headline = (model.records["measure"] or {}).get("headline") or {}
        if headline:
            shape = {"protocol": "equal batch", **{key: number(headline, key) for key in ("batch", "output_tokens")}}
            speeds = {"teacher": number(headline, "teacher_tokens_per_second")}
            speeds[model.name] = number(headline, "tokens_per_second")
            for name, each in speeds.items():
                rows.append({**shape, "model": name, "tokens_per_second": each})
            rows[-1] |= {"ratio": number(headline, "ratio")}
    keys, values = PROTOCOL[:4], PROTOCOL[4:]
    frame = pd.DataFrame(rows).reindex(columns=PROTOCOL).astype(dict.fromkeys(values, float))
    return frame.groupby(keys, sort=False, as_index=False, dropna=False)[values].median()
