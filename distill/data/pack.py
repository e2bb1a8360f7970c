"""Documents to packed rows that keep documents apart.

Legend: R = rows, T = sequence length. A packed row holds several documents; ``position_ids`` start at 0 in
each, which is how every mixer (attention masks and Mamba states alike) tells where one begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

IGNORE = -100  # label of a token that is not a target
OPEN_ROWS = 32  # rows kept open by first-fit packing
TOO_LONG = ("cut", "split", "drop")


@dataclass(frozen=True)
class Document:
    """One tokenised example: ``ids[n]``, and ``labels[n]``: the same, or IGNORE where nothing is learned."""

    ids: list[int]
    labels: list[int]

    @property
    def completion(self) -> int:
        """The index of the first token to learn; n where there is none."""
        return next((place for place, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


@dataclass
class Counts:
    """What went into packed rows, and what did not."""

    read: int = 0
    """Documents taken from the source."""
    too_long: int = 0
    """Those among them that are longer than a row."""
    lost: int = 0
    """Tokens that were cut off, or dropped with their document."""
    rows: int = 0
    documents: int = 0
    """Documents in the rows; pieces of a document that was split count one each."""
    tokens: int = 0
    targets: int = 0
    """Tokens that are learned."""
    padding: int = 0
    """Places in the rows that hold no token."""

    def describe(self, length: int, too_long: str) -> str:
        """One line of text."""
        share = lambda part, whole: f"{100 * part / max(whole, 1):.1f}%"  # noqa: E731
        done = {"cut": "cut", "split": "split", "drop": "dropped"}[too_long]
        longer = f", {self.too_long:,} longer than {length:,} {done} ({self.lost:,} tokens lost)"
        return (
            f"{self.read:,} documents read{longer if self.too_long else ''}; {self.rows:,} rows of {length:,} hold "
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.targets:,} learned "
            f"({share(self.targets, self.tokens)}), {share(self.padding, self.tokens + self.padding)} padding"
        )


def fit(documents: Iterable[Document], length: int, too_long: str, counts: Counts) -> Iterator[Document]:
    """Documents of at most ``length`` tokens: a longer one is ``cut`` to it, ``split`` into pieces that are documents
    of their own (their masks kept), or left out (``drop``)."""
    for document in documents:
        counts.read += 1
        size = len(document.ids)
        if size <= length:
            yield document
            continue
        counts.too_long += 1
        if too_long == "split":
            for start in range(0, size, length):
                yield Document(document.ids[start : start + length], document.labels[start : start + length])
        elif too_long == "cut":
            counts.lost += size - length
            yield Document(document.ids[:length], document.labels[:length])
        else:
            counts.lost += size


def pack(
    documents: Iterable[Document], length: int, pad: int, too_long: str = "cut", counts: Counts | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """First-fit packing of whole documents into rows of ``length`` tokens; ``too_long`` is what ``fit`` does.

    Yields ``input_ids``, ``labels``, ``position_ids``, each int64 [T], and adds to ``counts`` as it goes. Labels are
    not shifted (the model shifts); the first token of a document is never a target, nor is padding, which counts as a
    document of its own.
    """
    counts = Counts() if counts is None else counts
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in fit(documents, length, too_long, counts):
        need = len(document.ids)
        place = next((i for i, room in enumerate(free) if room >= need), None)
        if place is None:
            if len(rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=free.__getitem__)
                yield _row(rows.pop(fullest), length, pad, counts)
                free.pop(fullest)
            rows.append([])
            free.append(length)
            place = len(rows) - 1
        rows[place].append(document)
        free[place] -= need
    for row in rows:
        yield _row(row, length, pad, counts)


def _row(documents: list[Document], length: int, pad: int, counts: Counts) -> dict[str, torch.Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids += document.ids
        labels += [IGNORE, *document.labels[1:]] if document.ids else []
        positions += range(len(document.ids))
    rest = length - len(ids)
    counts.rows += 1
    counts.documents += len(documents)
    counts.tokens += len(ids)
    counts.padding += rest
    counts.targets += sum(label != IGNORE for label in labels)
    return {
        "input_ids": torch.tensor(ids + [pad] * rest),
        "labels": torch.tensor(labels + [IGNORE] * rest),
        "position_ids": torch.tensor(positions + list(range(rest))),
    }


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows [T] into a batch [R, T]. No attention mask: the positions say where documents begin."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
