"""Mixtures: several sources by weight, each packed row from one of them; and the data that a config names."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distill.config import DataConfig, Origin, SourceConfig
from distill.data.chat import MASKS
from distill.data.examples import check_columns
from distill.data.pack import TOO_LONG, Counts
from distill.data.sources import EMBEDDED, files, is_hub
from distill.data.traces import Row, check_source, learns, load_rows, nothing_to_learn, pack_examples, read_examples
from distill.errors import UserError, choose

CHECKED = 10_000  # rows of a source that are read before any work is spent
TOKENISED = 256  # those of them that are tokenised


class MixedTraces(Dataset[Row]):
    """Rows [T] of several datasets, drawn by weight. As all rows have T tokens, weights are shares of tokens.

    Which source row i comes from depends on (seed, i) alone, and each source gives its rows in its own order, so
    that a file is read through before any of it is read again.

    Args:
        parts: one dataset a source; ``choices[i]`` is the source of row i (see ``draw_sources``).
    """

    def __init__(self, parts: Sequence[Any], choices: Sequence[int]) -> None:
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
    check_options(data)

    def part(origin: Origin, count: int) -> Any:
        return load_rows(origin, data, tokenizer, count, seed, held_out=held_out)

    if not data.mixture:
        return part(data, rows)
    used = origins(data)
    choices = draw_sources([entry.weight for entry in data.mixture if entry.weight > 0], rows, seed)
    return MixedTraces([part(entry, max(choices.count(i), 1)) for i, entry in enumerate(used)], choices)


def origins(data: DataConfig) -> Sequence[Origin]:
    """The sources that rows are taken from."""
    return [entry for entry in data.mixture if entry.weight > 0] if data.mixture else [data]


def counts(data: DataConfig, rows: Any) -> dict[str, Counts]:
    """What the rows that ``load_data`` gave hold so far, by source; of the embedded data, the first ``SHARD``."""
    parts = rows.parts if data.mixture else [rows]
    return {label(origin): part.counts for origin, part in zip(origins(data), parts, strict=True)}


def counts_record(data: DataConfig, rows: Any) -> dict[str, dict[str, int]]:
    """``counts`` as JSON, for the record of a step."""
    return {name: asdict(found) for name, found in counts(data, rows).items()}


def describe_rows(data: DataConfig, rows: Any, tokenizer: Any) -> list[str]:
    """What the rows that ``load_data`` gave hold, as lines of text; of a stream, what its first documents do."""
    if data.streaming and (lines := describe_survey(data, lambda: tokenizer)):
        return lines
    found = counts(data, rows)
    return [f"{name}: {each.describe(data.sequence_length, data.too_long)}" for name, each in found.items()]


def label(origin: Origin) -> str:
    """A source's name, with subset and split where they are not the usual."""
    more = ", ".join(part for part in (origin.subset, origin.split if origin.split != "train" else "") if part)
    return f"{origin.source} ({more})" if more else origin.source


def check_data(data: DataConfig, load_tokenizer: Callable[[], Any] | None = None, key: str = "data.source") -> None:
    """Raise UserError where a source does not exist, options make no sense, one of its first ``CHECKED`` rows is
    malformed, or (with a tokenizer, which is loaded if it is needed) nothing of the first ones can be learned."""
    check_options(data)
    keys = [f"data.mixture[{number}].source" for number in range(len(data.mixture))] or [key]
    named: Sequence[Origin] = data.mixture or [data]
    for name, origin in zip(keys, named, strict=True):
        check_source(origin, data.mix, name)
    for origin in origins(data):
        if origin.source != EMBEDDED:
            survey(origin, data, load_tokenizer)


def survey(origin: Origin, data: DataConfig, load_tokenizer: Callable[[], Any] | None = None) -> Counts:
    """Read the first rows of a source, and tokenise and pack some of them; returns what these hold.

    Raises UserError for a malformed row, and where there is nothing to learn.
    """
    limit = TOKENISED if data.streaming and is_hub(origin.source) else CHECKED  # what is streamed is not kept
    first = list(islice(read_examples(origin, streaming=data.streaming), limit))
    if len(first) < 2:
        raise UserError(f"{origin.source}: at least 2 documents are needed (one is held out), found {len(first)}")
    found = Counts()
    if load_tokenizer is not None:
        tokenizer, every = load_tokenizer(), Counts()
        for _ in pack_examples(first[:TOKENISED], tokenizer, data, found):
            pass
        if not found.targets and not any(learns(row) for row in pack_examples(first, tokenizer, data, every)):
            raise nothing_to_learn(origin, data, every)
    return found


def describe_survey(data: DataConfig, load_tokenizer: Callable[[], Any]) -> list[str]:
    """What the first documents of each local source hold, as lines of text."""
    lines = []
    for origin in origins(data):
        if files(origin):
            found = survey(origin, data, load_tokenizer)
            lines.append(f"{label(origin)}: first {found.describe(data.sequence_length, data.too_long)}")
    return lines


def check_options(data: DataConfig) -> None:
    """Raise UserError for options that make no sense, whatever the data are."""
    choose("data.mask", data.mask, MASKS)
    choose("data.too_long", data.too_long, TOO_LONG)
    for name in ("sequence_length", "shuffle_buffer"):
        if getattr(data, name) < 1:
            raise UserError(f"data.{name}={getattr(data, name)} must be above 0")
    check_columns(data.columns, "data.columns")
    check_weights(data.mixture)
    for number, entry in enumerate(data.mixture):
        check_columns(entry.columns, f"data.mixture[{number}].columns")


def check_weights(mixture: Sequence[SourceConfig]) -> None:
    """Raise UserError for negative weights, weights that are all zero, or a source that is there twice."""
    seen: dict[Any, int] = {}
    for number, entry in enumerate(mixture):
        if not (entry.weight >= 0 and math.isfinite(entry.weight)):
            raise UserError(f"data.mixture[{number}].weight={entry.weight} must be at least 0")
        local = entry.source != EMBEDDED and not is_hub(entry.source)
        place = str(Path(entry.source).expanduser().resolve()) if local else entry.source
        name = (place, entry.split, entry.subset, entry.revision)
        if name in seen:
            raise UserError(f"data.mixture[{number}].source={entry.source} is data.mixture[{seen[name]}], too")
        seen[name] = number
    if mixture and sum(entry.weight for entry in mixture) <= 0:
        raise UserError("data.mixture needs a weight above 0")


def describe(data: DataConfig) -> str:
    """``25% embedded, 75% traces.jsonl``; the source alone where there is one."""
    if not data.mixture:
        return label(data)
    total = sum(entry.weight for entry in data.mixture)
    return ", ".join(f"{100 * entry.weight / total:.3g}% {label(entry)}" for entry in data.mixture)
