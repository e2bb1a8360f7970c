"""What was timed and what it held in memory, as pandas frames; NaN where a record does not tell.

`eval.throughput` and `eval.serving` say what the records hold; a record of before has no ``serving``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from eval.runs import Record, Run, number

TIMED = ["step_seconds", "step_seconds_low", "step_seconds_high", "roofline_fraction", "ratio"]
HELD = ["weight_bytes", "kv_bytes", "state_bytes", "overhead_bytes", "bytes"]
SPEEDS = [
    "tokens_per_second",
    "tokens_per_second_low",
    "tokens_per_second_high",
    "roofline_fraction",
    "ratio",
    "roofline_ratio",
]
PROTOCOL = ["protocol", "model", "batch", "output_tokens", *SPEEDS, "memory_bytes", "how"]
PREFILL = ["seconds", "seconds_low", "seconds_high", "roofline_fraction", "ratio"]

ENGINES = (
    "{names} ran in llama.cpp and the teacher in PyTorch: their speeds and ratios compare the programs as well as the "
    "models."
)


def engines_told(run: Run) -> str:
    """Which models another program ran than the teacher; empty where there are none."""
    names = [model.name for model in run.stored if model.records["measure"]]
    return ENGINES.format(names=", ".join(names)) if names else ""


def _measures(run: Run) -> Iterator[tuple[str, Record]]:
    """Every measure with the model that it is of; the teacher is timed in each."""
    yield "teacher", run.teacher or {}
    for model in run.models:
        yield model.name, model.records["measure"] or {}


def _served(run: Run, key: str) -> Iterator[dict[str, Any]]:
    """The entries of a list under ``serving`` of every measure, the model as the report calls it."""
    for name, measure in _measures(run):
        for row in (measure.get("serving") or {}).get(key) or []:
            yield {**row, "model": _model(name, row)}


def _model(name: str, row: Record) -> str:
    """The model of an entry: a hybrid's record may call it by the name that it had then."""
    return "teacher" if row.get("model") == "teacher" else name


def _joined(rows: list[dict[str, Any]], keys: list[str], values: list[str]) -> pd.DataFrame:
    """Rows with the same keys, as the teacher's of several runs, in one: the median, of bounds the outermost."""
    frame = pd.DataFrame(rows).reindex(columns=[*keys, *values]).astype(dict.fromkeys(values, float))
    how = {value: {"_low": "min", "high": "max"}.get(value[-4:], "median") for value in values}
    return frame.groupby(keys, sort=False, as_index=False, dropna=False).agg(how)


def throughput_frame(run: Run) -> pd.DataFrame:
    """Decode: model, batch, context, step_seconds and its quartiles (``_low``, ``_high``), roofline_fraction, and
    ratio, the speed over that of the teacher timed in the same run.

    The teacher is measured beside every hybrid: its row is the median of those runs, its band spans them all.
    """
    rows: list[dict[str, Any]] = []
    for name, measure in _measures(run):
        timed = measure.get("throughput") or []
        beside = [row for row in timed if row["model"] == "teacher"]
        teacher = {(row["batch"], row["context"]): number(row, "step_seconds") for row in beside}
        for row in timed:
            mine, other = number(row, "step_seconds"), teacher.get((row["batch"], row["context"]), math.nan)
            rows.append({**row, "model": _model(name, row), "ratio": other / mine if mine > 0 else math.nan})
    return _joined(rows, ["model", "batch", "context"], TIMED).sort_values(["batch", "context"])


def prefill_frame(run: Run) -> pd.DataFrame:
    """Prefill: model, batch, context (tokens of each prompt), seconds to the first token with quartiles,
    roofline_fraction, and ratio to the teacher timed in the same run."""
    rows: list[dict[str, Any]] = []
    for name, measure in _measures(run):
        timed = (measure.get("serving") or {}).get("prefill") or []
        beside = [row for row in timed if row["model"] == "teacher"]
        teacher = {(row["batch"], row["tokens"]): number(row, "seconds") for row in beside}
        for row in timed:
            mine, other = number(row, "seconds"), teacher.get((row["batch"], row["tokens"]), math.nan)
            ratio = other / mine if mine > 0 else math.nan
            rows.append({**row, "model": _model(name, row), "context": row["tokens"], "ratio": ratio})
    return _joined(rows, ["model", "batch", "context"], PREFILL).sort_values(["batch", "context"])


def memory_frame(run: Run) -> pd.DataFrame:
    """Memory: model, batch, context, the bytes of `HELD` (``bytes``: all told), and computed, or else measured.

    Of records without ``serving``, what the cache held where decoding was timed.
    """
    rows: list[dict[str, Any]] = []
    for row in _served(run, "memory"):
        rows.append(
            {**row, "context": row["tokens"], "bytes": row.get("total_bytes"), "computed": not row.get("measured")}
        )
    if not rows:
        for name, measure in _measures(run):
            for row in measure.get("throughput") or []:
                held = {"weight_bytes": None, "overhead_bytes": None, "bytes": row.get("cache_bytes")}
                rows.append({**row, **held, "model": _model(name, row), "computed": False})
    frame = _joined(rows, ["model", "batch", "context", "computed"], HELD)
    return frame.sort_values(["batch", "context"], kind="stable")


def protocol_frame(run: Run) -> pd.DataFrame:
    """1 token in, N out: a row for every protocol (and batch, of the equal ones) and model, columns `PROTOCOL`.

    Of records without ``serving``, the headline alone.
    """
    rows = [
        {**row, "protocol": "equal memory" if row["protocol"] == "equal_memory" else f"batch {row['batch']}"}
        for row in _served(run, "one_in_n_out")
    ]
    for model in run.models if not rows else []:
        headline = (model.records["measure"] or {}).get("headline") or {}
        if headline:
            shape = {"protocol": f"batch {headline.get('batch')}", "output_tokens": headline.get("output_tokens")}
            shape["batch"] = headline.get("batch")
            speed = headline.get("teacher_tokens_per_second")
            rows.append({**shape, "model": "teacher", "tokens_per_second": speed, "ratio": 1.0})
            rows.append({**headline, **shape, "model": model.name})
    rows = [{**row, "how": row.get("how", "")} for row in rows]
    keys = ["protocol", "model", "batch", "output_tokens", "how"]
    return _joined(rows, keys, [*SPEEDS, "memory_bytes"])[PROTOCOL]


def pays_from(run: Run) -> list[str]:
    """From which context a mixer pays, a line a mixer, as the newest record that tells it says."""
    told: Record = {}
    for _, measure in _measures(run):
        told = (measure.get("serving") or {}).get("pays_from") or told
    lines = []
    for mixer, by_batch in told.items():
        parts = [
            f"from context {context:,} at batch {batch}" if context else f"not within a million tokens at batch {batch}"
            for batch, context in by_batch.items()
        ]
        lines.append(f"with {mixer} {', '.join(parts)}")
    return lines


def machine(run: Run) -> str:
    """The machine whose roofline the fractions are of, in words; empty where no record tells."""
    found: Record = {}
    for _, measure in _measures(run):
        found = (measure.get("serving") or {}).get("machine") or found
    if not found:
        return ""
    copy, product = number(found, "copy_bytes_per_second") / 1e9, number(found, "product_flops_per_second") / 1e9
    return f"{found.get('name', 'this machine')}: {copy:,.1f} GB/s copied, {product:,.0f} Gflop/s in matrix products"
