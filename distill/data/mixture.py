"""Mixtures: several sources by weight, each packed row from one of them; and the data that a config names."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distill.config import DataConfig, SourceConfig
from distill.data.traces import EMBEDDED, Row, check_source, load_rows
from distill.errors import UserError


class MixedTraces(Dataset[Row]):
    """Rows [T] of several datasets, drawn by weight. As all rows have T tokens, weights are shares of tokens.

    Which source row i comes from depends on (seed, i) alone, and each source gives its rows in its own order, so
    that a file is read through before any of it is read again.

    Args:
        parts: one dataset a source; ``choices[i]`` is the source of row i (see ``draw_sources``).
    """

    def __init__(self, parts: Sequence[Dataset[Row]], choices: Sequence[int]) -> None:
        self.parts, self.choices = parts, choices
        counts = [0] * len(parts)
        self.places: list[int] = []
        for choice in choices:
            self.places.append(counts[choice])
            counts[choice] += 1

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self.choices):
            raise IndexError(index)
        return self.parts[self.choices[index]][self.places[index]]


def draw_sources(weights: Sequence[float], rows: int, seed: int) -> list[int]:
    """The source of each of ``rows`` rows; the first n do not depend on ``rows``."""
    rng = random.Random(f"mixture/{seed}")
    bounds = list(accumulate(weights))
    return rng.choices(range(len(weights)), cum_weights=bounds, k=rows)


def load_data(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, *, held_out: bool = False
) -> Dataset[Row]:
    """``rows`` packed rows of what a config names; with ``held_out`` of the held-out part of each source, in the
    same shares.

    Raises UserError for sources that do not exist, cannot be read, or hold nothing to learn.
    """
    check_data(data)

    def part(source: str, count: int) -> Dataset[Row]:
        return load_rows(
            source, tokenizer, count, data.sequence_length, data.mix, seed, mask=data.mask, held_out=held_out
        )

    if not data.mixture:
        return part(data.source, rows)
    used = [entry for entry in data.mixture if entry.weight > 0]
    choices = draw_sources([entry.weight for entry in used], rows, seed)
    return MixedTraces([part(entry.source, max(choices.count(i), 1)) for i, entry in enumerate(used)], choices)


def check_data(data: DataConfig) -> None:
    """Raise UserError where a source does not exist, or weights make no sense."""
    check_weights(data.mixture)
    if not data.mixture:
        check_source(data.source, data.mix)
    for number, entry in enumerate(data.mixture):
        check_source(entry.source, data.mix, f"data.mixture[{number}].source")


def check_weights(mixture: Sequence[SourceConfig]) -> None:
    """Raise UserError for negative weights, weights that are all zero, or a source that is there twice."""
    seen: dict[str, int] = {}
    for number, entry in enumerate(mixture):
        if not (entry.weight >= 0 and math.isfinite(entry.weight)):
            raise UserError(f"data.mixture[{number}].weight={entry.weight} must be at least 0")
        name = entry.source if entry.source == EMBEDDED else str(Path(entry.source).expanduser().resolve())
        if name in seen:
            raise UserError(f"data.mixture[{number}].source={entry.source} is data.mixture[{seen[name]}], too")
        seen[name] = number
    if mixture and sum(entry.weight for entry in mixture) <= 0:
        raise UserError("data.mixture needs a weight above 0")


def describe(data: DataConfig) -> str:
    """``25% embedded, 75% traces.jsonl``; the source alone where there is one."""
    if not data.mixture:
        return data.source
    total = sum(entry.weight for entry in data.mixture)
    return ", ".join(f"{100 * entry.weight / total:.3g}% {entry.source}" for entry in data.mixture)
