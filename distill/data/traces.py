"""Datasets of packed rows: the embedded traces (endless, by seed) and the user's own, held in memory or streamed."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distill.config import DataConfig, Origin
from distill.data.chat import encode, encode_examples
from distill.data.examples import Example, parse_row
from distill.data.families import FAMILIES, HELD_OUT_SHARE, draw
from distill.data.pack import IGNORE, Counts, Document, pack
from distill.data.sources import EMBEDDED, check_place, read
from distill.errors import UserError, choose

Row = dict[str, torch.Tensor]
SHARD = 64  # rows generated together; of a stream, those kept at hand
BATCH = 256  # examples tokenised together


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; it is never a target."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


class EmbeddedTraces(Dataset[Row]):
    """Packed rows of the five families; row i depends on (seed, i) alone, so any row can be had at any time.

    Args:
        rows: number of rows R.
        length: tokens a row T.
        mix: weight of each family (any positive numbers).
        held_out: draw from the held-out side of the split (for validation).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        length: int,
        mix: Mapping[str, float],
        seed: int,
        *,
        mask: str = "completion",
        too_long: str = "cut",
        held_out: bool = False,
    ) -> None:
        self.tokenizer, self.rows, self.length, self.seed = tokenizer, rows, length, seed
        self.mix, self.mask, self.too_long, self.held_out = dict(mix), mask, too_long, held_out
        self._shard: tuple[int, list[Row]] = (-1, [])
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """What is in the first ``SHARD`` rows."""
        if not self._counts.rows:
            self._shard = (0, self._generate(0))
        return self._counts

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        shard, place = divmod(index, SHARD)
        if self._shard[0] != shard:
            self._shard = (shard, self._generate(shard))
        return self._shard[1][place]

    def _generate(self, shard: int) -> list[Row]:
        rng = random.Random(f"{self.seed}/{shard}/{self.held_out}")
        counts = Counts()
        packed = pack(self._documents(rng, counts), self.length, pad_id(self.tokenizer), self.too_long, counts)
        rows = list(islice(packed, SHARD))
        if shard == 0:
            self._counts = counts
        return rows

    def _documents(self, rng: random.Random, counts: Counts) -> Any:
        """Without end, unless all are dropped for being too long."""
        families, weights = list(self.mix), list(self.mix.values())
        while self.too_long != "drop" or counts.too_long < max(counts.read, BATCH):
            names = rng.choices(families, weights, k=BATCH)
            examples = [draw(name, rng, held_out=self.held_out) for name in names]
            yield from encode(self.tokenizer, [example.messages for example in examples], self.mask)


class FileTraces(Dataset[Row]):
    """Packed rows of a source held in memory: shuffled by seed, repeated when there are fewer than are asked for."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        origin: Origin,
        rows: int,
        data: DataConfig,
        seed: int,
        *,
        held_out: bool = False,
    ) -> None:
        self.counts, self.rows = Counts(), rows
        examples = split(list(read_examples(origin)), origin.source, held_out=held_out)
        random.Random(seed).shuffle(examples)
        self.packed = list(islice(pack_examples(examples, tokenizer, data, self.counts), rows))
        if not any(learns(row) for row in self.packed):
            raise nothing_to_learn(origin, data, self.counts)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return self.packed[index % len(self.packed)]


class StreamedTraces(Dataset[Row]):
    """Packed rows of a source that is read as they are asked for; row i depends on (source, seed, i) alone.

    Rows are meant to be asked for in order; going back further than ``SHARD`` rows reads from the beginning, going
    ahead reads all that lies between. Held-out rows are few and kept.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        origin: Origin,
        rows: int,
        data: DataConfig,
        seed: int,
        *,
        held_out: bool = False,
    ) -> None:
        self.tokenizer, self.origin, self.rows = tokenizer, origin, rows
        self.data, self.seed, self.held_out = data, seed, held_out
        self.counts = Counts()
        self._restart()
        if not any(learns(self[index]) for index in range(min(SHARD, rows))):
            raise nothing_to_learn(origin, data, self.counts)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        if index < self._next - len(self._near):
            self._restart()
        while self._next <= index:
            self._near.append(next(self._rows))
            self._next += 1
        return self._near[index - self._next]

    def _restart(self) -> None:
        self._rows, self._next = self._passes(), 0
        self._near: deque[Row] = deque(maxlen=None if self.held_out else SHARD)

    def _passes(self) -> Iterator[Row]:
        """The rows of the source, again and again."""
        while True:
            self.counts = counts = Counts()
            examples = read_examples(self.origin, streaming=True)
            mine = (example for example in examples if is_held_out(example) == self.held_out)
            # few are held out: a buffer as large would have to read far ahead to be filled
            buffer = max(self.data.shuffle_buffer // (HELD_OUT_SHARE // 2 if self.held_out else 1), 1)
            mixed = shuffle(mine, buffer, self.seed)
            yield from pack_examples(mixed, self.tokenizer, self.data, counts)
            if not counts.read:
                side = "held-out " if self.held_out else ""
                raise UserError(f"{self.origin.source}: no {side}documents to stream: set data.streaming=false")
            if not counts.targets:
                raise nothing_to_learn(self.origin, self.data, counts)


def read_examples(origin: Origin, *, streaming: bool = False) -> Iterator[Example]:
    """The examples of a source in order, each checked; a malformed row is named by where it stands."""
    return (parse_row(row, origin.columns, where) for where, row in read(origin, streaming=streaming))


def read_documents(origin: Origin, tokenizer: PreTrainedTokenizerBase, mask: str) -> Iterator[Document]:
    """The tokenised examples of a source, in order."""
    return documents(read_examples(origin), tokenizer, mask)


def documents(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, mask: str) -> Iterator[Document]:
    """Tokenise examples, some at a time."""
    remaining = iter(examples)
    while some := list(islice(remaining, BATCH)):
        yield from encode_examples(tokenizer, some, mask)


def pack_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig, counts: Counts
) -> Iterator[Row]:
    """Tokenise and pack examples in the order that they come."""
    tokenised = documents(examples, tokenizer, data.mask)
    return pack(tokenised, data.sequence_length, pad_id(tokenizer), data.too_long, counts)


def is_held_out(example: Example) -> bool:
    """Whether an example is held out: by a hash of what is asked, so that no question stands on both sides."""
    salted = f"data/{example.key}"  # not as the families do it: of their training questions none would be held out
    return hashlib.sha256(salted.encode()).digest()[0] % HELD_OUT_SHARE == 0


def split(examples: Sequence[Example], source: str, *, held_out: bool) -> list[Example]:
    """One side of the examples: by ``is_held_out``, or where that leaves a side empty the last 1/16 and the rest.

    Raises UserError for fewer than two.
    """
    if len(examples) < 2:
        raise UserError(f"{source}: at least 2 documents are needed (one is held out), found {len(examples)}")
    sides = [is_held_out(example) for example in examples]
    if len(set(sides)) < 2:
        cut = len(examples) - max(1, len(examples) // HELD_OUT_SHARE)
        sides = [number >= cut for number in range(len(examples))]
    return [example for example, side in zip(examples, sides, strict=True) if side == held_out]


def shuffle(examples: Iterable[Example], buffer: int, seed: int) -> Iterator[Example]:
    """Examples in random order, ``buffer`` of them held at a time; where that is all, as by ``Random.shuffle``."""
    rng = random.Random(seed)
    held: list[Example] = []
    for example in examples:
        if len(held) < buffer:
            held.append(example)
            continue
        place = rng.randrange(buffer)
        yield held[place]
        held[place] = example
    rng.shuffle(held)
    yield from held


def learns(row: Row) -> bool:
    """Whether a row has a target."""
    return bool((row["labels"] != IGNORE).any())


def nothing_to_learn(origin: Origin, data: DataConfig, counts: Counts) -> UserError:
    """What to say of a source whose rows have no target."""
    if counts.rows:
        what = f"no completion tokens within data.sequence_length={data.sequence_length} (data.mask={data.mask})"
    else:
        what = f"all documents are longer than data.sequence_length={data.sequence_length}"
    return UserError(
        f"{origin.source}: {what}; {counts.too_long:,} of {counts.read:,} documents are longer: raise "
        f"data.sequence_length, or set data.too_long=split (it is {data.too_long})"
    )


def load_rows(
    origin: Origin,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    seed: int,
    *,
    held_out: bool = False,
) -> EmbeddedTraces | FileTraces | StreamedTraces:
    """The dataset of one source, made into rows as ``data`` says; its ``counts`` say what it holds."""
    check_source(origin, data.mix)
    if origin.source == EMBEDDED:
        traces = EmbeddedTraces(
            tokenizer, rows, data.sequence_length, data.mix, seed,
            mask=data.mask, too_long=data.too_long, held_out=held_out,
        )  # fmt: skip
        if not traces.counts.targets:
            raise nothing_to_learn(origin, data, traces.counts)
        return traces
    kind = StreamedTraces if data.streaming else FileTraces
    return kind(tokenizer, origin, rows, data, seed, held_out=held_out)


def check_source(origin: Origin, mix: Mapping[str, float], key: str = "data.source") -> None:
    """Raise UserError where a source (that ``key`` names) does not exist, or the mix of the families makes no sense."""
    check_place(origin, key)
    if origin.source != EMBEDDED:
        return
    for family in mix:
        choose("family in data.mix", family, FAMILIES)
    if not mix or sum(mix.values()) <= 0 or min(mix.values()) < 0:
        raise UserError(f"data.mix needs positive weights, got {dict(mix)}")
