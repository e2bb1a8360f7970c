"""Rows of packed documents as padded batches of whole documents, for kernels that know no document starts.

A document of n tokens becomes a row of the next power of two (or of T, where that is less), in a batch with all of the
same length: less than half of the places are padding, and a call makes at most log2(T) + 2 launches. How a document is
computed then depends on its own length alone, and nothing of another is there to reach it: not a rounding, not a NaN.
Tokens are moved by index, forward and backward, and never summed. Padding is zeros, which a scan passes unchanged: a
step of 0 keeps the state.

Where documents begin has to be known on the CPU: a wait for the GPU, once for a ``reset`` that many layers are given.

    B = batch, T = tokens
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MOST_ROWS = 2**15  # of a batch: Triton kernels count rows where CUDA takes at most 65,535

V = TypeVar("V")


def by_document(
    scan: Callable[..., tuple[Tensor, Tensor]],
    tokens: Sequence[Tensor],
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``scan(*tokens, initial_state) -> (y, final_state)``, called as it is without ``reset``, or on whole documents.

    Args:
        scan: takes and returns what this does, for any number of rows and tokens, without ``reset``; its state is
            detached, and a step of 0 keeps it.
        tokens: operands ``[B, T, ...]``.
        reset: ``[B, T]`` bool; True where a document starts.
        initial_state: ``[B, ...]``; goes to the first document of a row, unless the row begins with a start.

    Returns:
        y ``[B, T, ...]``, and the state ``[B, ...]`` after the last token of each row.
    """
    if reset is None or not len(reset):
        return scan(*tokens, initial_state)
    rows = split(reset)
    if initial_state is None:
        states: Sequence[Tensor | None] = [None] * len(rows.sizes)
    else:
        states = rows.states(initial_state.masked_fill(reset[:, 0].view(-1, *[1] * (initial_state.ndim - 1)), 0))
    batches = zip(*(rows.documents(operand) for operand in tokens), states, strict=True)
    outputs, finals = zip(*(scan(*batch) for batch in batches), strict=True)
    return rows.tokens(outputs), torch.cat(finals).index_select(0, rows.last)


def remembered(make: Callable[[Tensor], V]) -> Callable[[Tensor], V]:
    """Decorate ``make(reset)``: what it made is kept for as long as that tensor lives and is not written to."""
    known: Any = WeakTensorKeyDictionary()

    @functools.wraps(make)
    def recall(reset: Tensor) -> V:
        with torch.device("cpu"):  # whatever a caller's default is: plans are made there
            if reset.is_inference():  # it does not count how often it was written to
                return make(reset)
            version, made = known.get(reset, (None, None))
            if version != reset._version:
                version, made = known[reset] = (reset._version, make(reset))
            return made

    return recall


@dataclass(frozen=True)
class Documents:
    """The documents of rows laid end to end, on the CPU: their ``edges`` (one more than documents), and which of them
    is the ``first`` and which the ``last`` of every row."""

    edges: Tensor
    first: Tensor
    last: Tensor


@remembered
def documents(reset: Tensor) -> Documents:
    """The documents of ``reset [B, T]``. Waits for the GPU."""
    starts = reset.cpu().clone()
    starts[:, 0] = True
    number = starts.flatten().cumsum(0).view_as(starts) - 1
    edges = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])])
    return Documents(edges, number[:, 0], number[:, -1])


@dataclass(frozen=True)
class SplitRows:
    """Where every token of ``B * T`` goes, and what is in each of the M places of all batches laid end to end."""

    shape: tuple[int, int]  # B, T
    sizes: list[tuple[int, int]]  # of every batch: documents, and the places of each
    begins: list[bool]  # whether a batch holds a row's first document
    source: Tensor  # [M] the token in a place; 0 in padding
    padding: Tensor  # [M] bool
    place: Tensor  # [B * T]
    first: Tensor  # [B] which document, counted through the batches, is a row's first
    last: Tensor  # [B]

    def documents(self, operand: Tensor) -> Sequence[Tensor]:
        """``[B, T, ...]`` to ``[documents, places, ...]`` batch by batch; differentiable, as what follows."""
        places: Tensor = _Move.apply(operand.flatten(0, 1), self, True)
        parts = places.split([count * room for count, room in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def tokens(self, batches: Sequence[Tensor]) -> Tensor:
        """The other way round."""
        rows: Tensor = _Move.apply(torch.cat([batch.flatten(0, 1) for batch in batches]), self, False)
        return rows.unflatten(0, self.shape)

    def states(self, initial: Tensor) -> Sequence[Tensor | None]:
        """``[B, ...]`` to ``[documents, ...]`` batch by batch: zeros where a document is not the first of its row, and
        None for a batch without any that is."""
        counts = [count for count, _ in self.sizes]
        spread = initial.new_zeros(sum(counts), *initial.shape[1:]).index_copy(0, self.first, initial)
        return [part if begins else None for part, begins in zip(spread.split(counts), self.begins, strict=True)]


@remembered
def split(reset: Tensor) -> SplitRows:
    """How the documents of ``reset [B, T]`` are laid out in batches, the short ones first."""
    batch, length = reset.shape
    found = documents(reset)
    starts, lengths = found.edges[:-1], found.edges.diff()
    rooms = torch.tensor([min(1 << (n - 1).bit_length(), length) for n in lengths.tolist()])
    order = rooms.argsort(stable=True)
    starts, lengths, rooms = starts[order], lengths[order], rooms[order]
    position = torch.arange(int(rooms.sum())) - (rooms.cumsum(0) - rooms).repeat_interleave(rooms)
    padding = position >= lengths.repeat_interleave(rooms)
    source = (starts.repeat_interleave(rooms) + position).masked_fill(padding, 0)
    place = torch.empty(reset.numel(), dtype=torch.long)
    place[source[~padding]] = (~padding).nonzero()[:, 0]
    sizes = []
    for room, count in zip(*(each.tolist() for each in rooms.unique_consecutive(return_counts=True)), strict=True):
        sizes += [(min(MOST_ROWS, count - done), room) for done in range(0, count, MOST_ROWS)]
    rank = order.argsort()
    first, last = rank[found.first], rank[found.last]
    is_first = torch.zeros(len(rooms), dtype=torch.bool).index_fill(0, first, True)
    begins = [bool(part.any()) for part in is_first.split([count for count, _ in sizes])]
    moved = (tensor.to(reset.device) for tensor in (source, padding, place, first, last))
    return SplitRows((batch, length), sizes, begins, *moved)


class _Move(torch.autograd.Function):
    """Tokens ``[B * T, ...]`` to places ``[M, ...]`` or back. Every token has one place, so either is a gather, and the
    backward of one is the other: what a kernel says about padding is dropped, be it NaN."""

    @staticmethod
    def forward(ctx: Any, operand: Tensor, rows: SplitRows, to_places: bool) -> Tensor:
        ctx.rows, ctx.to_places = rows, to_places
        if not to_places:
            return operand.index_select(0, rows.place)
        return operand.index_select(0, rows.source).masked_fill_(rows.padding.view(-1, *[1] * (operand.ndim - 1)), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Move.apply(gradient, ctx.rows, not ctx.to_places), None, None
