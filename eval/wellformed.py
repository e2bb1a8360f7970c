"""Whether a record of a run has the form that the report reads: lists with their keys, numbers that are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import brief

LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "score": {"blocks": ("block",), "compared": ("scorer", "spearman", "same_choice")},
    "place": {"mixers": (), "added": ()},
    "measure": {
        "accuracy": ("task", "kind"),
        "throughput": ("model", "batch", "context"),
        "by_distance": ("task", "distance", "value", "n"),
    },
}
"""The lists that a record must hold (of `OPTIONAL`: may), and what each of their entries must hold."""
SERVING = {
    "one_in_n_out": ("model", "protocol", "batch"),
    "prefill": ("model", "batch", "tokens"),
    "memory": ("model", "batch", "tokens"),
}
"""The same of the lists under ``serving`` in the record of a measure, all of which may be absent."""
OPTIONAL = ("by_distance", "compared")
TEXTS = ("task", "kind", "metric", "model", "name", "scorer", "start", "protocol", "how")
COUNTS = (
    "block", "batch", "context", "n", "distance", "replaced", "num_blocks", "step", "truncated", "empty", "cut",
    "samples",
)  # fmt: skip
FRACTIONS = ("value", "stderr")
NUMBERS = (
    *COUNTS, *FRACTIONS, "score", "loss_start", "loss_end", "step_seconds", "step_seconds_low", "step_seconds_high",
    "cache_bytes", "kv_bytes", "state_bytes", "tokens", "minutes", "eval_loss", "eval_loss_start", "steps",
    "weight_bytes", "overhead_bytes", "total_bytes", "memory_bytes", "seconds", "seconds_low", "seconds_high",
    "roofline_fraction", "output_tokens", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high",
    "ratio", "roofline_ratio", "spearman", "same_choice", "truncated", "empty", "samples",
)  # fmt: skip
"""Keys whose values are texts and numbers, wherever in a record they stand; null stands for what is not known."""
MOST = 1e18  # of a count: beyond, it is no count of anything


def problem(step: str, record: Any) -> str:
    """What is wrong with the record of a step, in words that follow "it holds"; empty where nothing is."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__} instead of an object"
    for name, keys in LISTS.get(step, {}).items():
        entries = record.get(name, [] if name in OPTIONAL else None)
        if not isinstance(entries, list):
            return f"no list '{name}'"
        if keys and not all(isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries):
            return f"an entry of '{name}' without {' and '.join(keys)}"
        if wrong := next((text for entry in entries if keys and (text := wrong_value(entry, keys))), ""):
            return wrong
    if not isinstance(record.get("headline") or {}, dict):
        return "a headline that is no object"
    if wrong := wrong_value(record.get("headline") or {}):
        return wrong
    if wrong := wrong_serving(record.get("serving") or {}) if step == "measure" else "":
        return wrong
    if step == "place":
        mixers, added = record["mixers"], record["added"]
        if not all(isinstance(mixer, str) for mixer in mixers):
            return "mixers that are no names"
        if not all(type(block) is int and 0 <= block < len(mixers) for block in added):
            return f"added blocks that are not in [0, {len(mixers)})"
    return wrong_value(record)


def wrong_serving(serving: Any) -> str:
    """What is wrong with the part ``serving`` of a measure, in the same words."""
    if not isinstance(serving, dict):
        return "a serving that is no object"
    for name, keys in SERVING.items():
        entries = serving.get(name) or []
        if not isinstance(entries, list):
            return f"no list '{name}'"
        if not all(isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries):
            return f"an entry of '{name}' without {' and '.join(keys)}"
        if wrong := next((text for entry in entries if (text := wrong_value(entry, keys))), ""):
            return wrong
    pays = serving.get("pays_from") or {}
    known = isinstance(pays, dict) and all(isinstance(by_batch, dict) for by_batch in pays.values())
    if not known or not all(c is None or type(c) is int for by_batch in pays.values() for c in by_batch.values()):
        return "a pays_from that is no context by mixer and batch"
    return "" if isinstance(serving.get("machine") or {}, dict) else "a machine that is no object"


def wrong_value(entry: Mapping[str, Any], required: Sequence[str] = (), numbers: Sequence[str] = NUMBERS) -> str:
    """The first value in ``entry`` of another type or range than its key has; empty where all are right."""
    for key, value in entry.items():
        if value is None and key not in required:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in TEXTS and not isinstance(value, str):
            return f"{key}={brief(repr(value), 60)}, expected text"
        if key in numbers and not number:
            return f"{key}={brief(repr(value), 60)}, expected a number"
        if key in numbers and key != "loss" and value in (math.inf, -math.inf):  # a loss may have diverged
            return f"{key}={value!r}, expected a finite number"
        if key in COUNTS and not (key == "n") <= value <= MOST:
            return f"{key}={value!r}, expected a count"
        if key in FRACTIONS and not 0 <= value <= 1:
            return f"{key}={value!r}, expected a fraction"
    return ""
