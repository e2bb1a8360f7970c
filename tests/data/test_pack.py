"""Packing: every document once and whole, labels and positions right, what is too long by each policy, counts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.data.pack import IGNORE, OPEN_ROWS, TOO_LONG, Counts, Document, collate, fit, pack

PAD = 0


def document(ids: list[int], first: int) -> Document:
    """Learned from index ``first`` on."""
    return Document(ids, [IGNORE] * min(first, len(ids)) + ids[first:])


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Document], int]:
    """Documents of distinct tokens (so that each can be recognised) and a row length."""
    length = draw(st.integers(4, 24))
    sizes = draw(st.lists(st.integers(1, length), max_size=80))
    documents, first = [], 1
    for size in sizes:
        documents.append(document(list(range(first, first + size)), draw(st.integers(0, size + 2))))
        first += size
    return documents, length


def unpack(row: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a row, cut where the positions restart; padding last."""
    starts = [*torch.nonzero(row["position_ids"] == 0)[:, 0].tolist(), len(row["position_ids"])]
    return [(row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist()) for a, b in pairwise(starts)]


@given(corpora())
def test_every_document_once_and_whole(corpus: tuple[list[Document], int]) -> None:
    documents, length = corpus
    wanted = {tuple(document.ids): document for document in documents}
    seen: list[tuple[int, ...]] = []
    for row in pack(documents, length, PAD):
        assert all(value.shape == (length,) and value.dtype == torch.int64 for value in row.values())
        assert row.keys() == {"input_ids", "labels", "position_ids"}
        for place, (ids, labels) in enumerate(unpack(row)):
            if ids[0] == PAD:
                assert set(ids) == {PAD} and set(labels) == {IGNORE}
                assert place == len(unpack(row)) - 1, "padding comes last"
                continue
            document = wanted[tuple(ids)]
            seen.append(tuple(ids))
            first = max(document.completion, 1)
            assert labels[0] == IGNORE
            assert labels == [IGNORE if i < first else token for i, token in enumerate(ids)]
    assert sorted(seen) == sorted(wanted)


@given(corpora())
def test_positions_count_up_from_each_start(corpus: tuple[list[Document], int]) -> None:
    documents, length = corpus
    for row in pack(documents, length, PAD):
        positions = row["position_ids"].tolist()
        assert positions[0] == 0
        assert all(b in (0, a + 1) for a, b in pairwise(positions))
        starts = [int(row["input_ids"][i]) for i, p in enumerate(positions) if p == 0]
        assert set(starts) <= {PAD, *(document.ids[0] for document in documents)}


@given(corpora())
def test_no_row_could_have_been_spared(corpus: tuple[list[Document], int]) -> None:
    """First fit: while all rows are open, no two of them would fit into one."""
    documents, length = corpus
    rows = list(pack(documents, length, PAD))
    if len(rows) <= OPEN_ROWS:
        used = [int((row["input_ids"] != PAD).sum()) for row in rows]
        assert all(a + b > length for i, a in enumerate(used) for b in used[i + 1 :])


def test_a_row_is_closed_when_too_many_are_open() -> None:
    """Nothing is held back for longer than OPEN_ROWS rows, so an endless source can be packed."""

    def endless() -> Iterator[Document]:
        while True:
            yield document([7] * 3, 1)

    rows = pack(endless(), 4, PAD)
    assert all(next(rows)["input_ids"].tolist() == [7, 7, 7, PAD] for _ in range(3 * OPEN_ROWS))


@pytest.mark.parametrize("seed", range(5))
def test_the_fullest_row_is_closed_and_the_others_stay(seed: int) -> None:
    """Past OPEN_ROWS: rows of mixed sizes, none overfull, nothing lost."""
    rng = random.Random(seed)
    documents = [document([i] * rng.choice([5, 6, 7, 9, 11]), 1) for i in range(1, 400)]
    rows = list(pack(documents, 16, PAD))
    assert len(rows) > OPEN_ROWS
    assert {tuple(row["input_ids"].shape) for row in rows} == {(16,)}
    tokens = [token for row in rows for token in row["input_ids"].tolist() if token != PAD]
    assert sorted(tokens) == [token for document in documents for token in document.ids]


def test_the_order_of_first_fit() -> None:
    documents = [document([1] * 3, 1), document([2] * 4, 1), document([3], 1), document([4], 1)]
    assert [row["input_ids"].tolist() for row in pack(documents, 5, PAD)] == [[1, 1, 1, 3, 4], [2, 2, 2, 2, PAD]]


def test_a_document_too_long_is_cut() -> None:
    (row,) = pack([document(list(range(1, 10)), 3)], 5, PAD)
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 5]
    assert row["labels"].tolist() == [IGNORE, IGNORE, IGNORE, 4, 5]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_completion_beyond_the_cut_is_no_target() -> None:
    (row,) = pack([document(list(range(1, 10)), 7)], 5, PAD)
    assert row["labels"].tolist() == [IGNORE] * 5


def test_nothing_gives_nothing() -> None:
    assert list(pack([], 8, PAD)) == []


def test_collate() -> None:
    rows = list(pack([document([i] * 4, 1) for i in range(1, 4)], 4, PAD))
    batch = collate(rows)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(rows[0], (3, 4))
    assert batch["input_ids"][:, 0].tolist() == [1, 2, 3]


@st.composite
def long_corpora(draw: st.DrawFn) -> tuple[list[Document], int]:
    """Documents of distinct tokens, some longer than a row, learned in any places."""
    length = draw(st.integers(2, 12))
    documents, first = [], 1
    for size in draw(st.lists(st.integers(0, 40), max_size=30)):
        ids = list(range(first, first + size))
        documents.append(Document(ids, [token if draw(st.booleans()) else IGNORE for token in ids]))
        first += size
    return documents, length


@given(long_corpora(), st.sampled_from(TOO_LONG))
def test_what_is_too_long(corpus: tuple[list[Document], int], policy: str) -> None:
    """``split``: the pieces concatenate to the document; ``cut``: its beginning; ``drop``: nothing; masks go along."""
    documents, length = corpus
    counts = Counts()
    fitted = list(fit(documents, length, policy, counts))
    assert all(len(piece.ids) <= length for piece in fitted)
    kept = {
        "split": documents,
        "cut": [Document(d.ids[:length], d.labels[:length]) for d in documents],
        "drop": [d for d in documents if len(d.ids) <= length],
    }[policy]
    for name in ("ids", "labels"):
        assert [t for piece in fitted for t in getattr(piece, name)] == [t for d in kept for t in getattr(d, name)]
    assert counts.read == len(documents)
    assert counts.too_long == sum(len(d.ids) > length for d in documents)
    assert counts.lost == sum(len(d.ids) for d in documents) - sum(len(d.ids) for d in kept)


@given(long_corpora(), st.sampled_from(TOO_LONG))
def test_every_target_is_counted_once(corpus: tuple[list[Document], int], policy: str) -> None:
    """What the counts say is what the rows hold, and that is every piece: no token lost or made on the way."""
    documents, length = corpus
    counts = Counts()
    rows = list(pack(documents, length, PAD, policy, counts))
    pieces = list(fit(documents, length, policy, Counts()))
    tokens = [token for row in rows for token in row["input_ids"].tolist() if token != PAD]
    targets = [label for row in rows for label in row["labels"].tolist() if label != IGNORE]
    assert sorted(tokens) == sorted(token for piece in pieces for token in piece.ids)
    assert sorted(targets) == sorted(label for piece in pieces for label in piece.labels[1:] if label != IGNORE)
    assert len(set(targets)) == len(targets)
    assert (counts.rows, counts.documents) == (len(rows), len(pieces))
    assert (counts.tokens, counts.targets) == (len(tokens), len(targets))
    assert counts.padding == length * len(rows) - len(tokens)


def test_counts_as_text() -> None:
    counts = Counts()
    list(pack([document([1] * 12, 4), document([2] * 3, 0)], 8, PAD, "split", counts))
    assert counts.describe(8, "split") == (
        "2 documents read, 1 longer than 8 split (0 tokens lost); 2 rows of 8 hold 3 documents, 15 tokens, "
        "9 learned (60.0%), 6.2% padding"
    )
    assert "longer" not in Counts(read=2).describe(8, "drop")
