"""Whether a record of a run has the form that the report reads: lists with their keys, numbers that are numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import brief

LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "score": {"blocks": ("block",)},
    "place": {"mixers": (), "added": ()},
    "measure": {
        "accuracy": ("task", "kind"),
        "throughput": ("model", "batch", "context"),
        "by_distance": ("task", "distance", "value", "n"),
    },
}
"""The lists that a record must hold (of `OPTIONAL`: may), and what each of their entries must hold."""
OPTIONAL = ("by_distance",)
TEXTS = ("task", "kind", "metric", "model", "name", "scorer", "start")
COUNTS = (
    "block", "batch", "context", "n", "distance", "replaced", "num_blocks", "step", "truncated", "empty", "cut",
    "samples",
)  # fmt: skip
FRACTIONS = ("value", "stderr")
NUMBERS = (
    *COUNTS, *FRACTIONS, "score", "loss_start", "loss_end", "step_seconds", "step_seconds_low", "step_seconds_high",
    "cache_bytes", "kv_bytes", "state_bytes", "tokens", "minutes", "eval_loss", "eval_loss_start", "steps",
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
    if step == "place":
        mixers, added = record["mixers"], record["added"]
        if not all(isinstance(mixer, str) for mixer in mixers):
            return "mixers that are no names"
        if not all(type(block) is int and 0 <= block < len(mixers) for block in added):
            return f"added blocks that are not in [0, {len(mixers)})"
    return wrong_value(record)


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
        if key in COUNTS and not (key == "n") <= value <= MOST:
            return f"{key}={value!r}, expected a count"
        if key in FRACTIONS and not 0 <= value <= 1:
            return f"{key}={value!r}, expected a fraction"
    return ""
