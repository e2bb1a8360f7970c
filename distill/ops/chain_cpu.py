"""One token through consecutive blocks with mixers of one kind on CPU, in one compiled pass.

A row of a batch meets no other on its way, so that threads share the rows once for the whole chain: what a block costs
is its arithmetic, and nothing around it. What the blocks do is `decode_cpu` and `block_cpu`; here is the way from one
to the next. Float32 only.

    B = batch, E = hidden size, I = intermediate size, D = d_inner, N = states a channel, K = taps, R = dt_rank,
    S = rows of a mixer's input projection
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from distill.ops.block_cpu import ROWS, _product, _rest
from distill.ops.cpu import array, jit, softplus, spread, width_of
from distill.ops.decode_cpu import _mamba1, _mamba2, sources
from distill.ops.openmp import parallel

PROJECT, NORM, GATE, UP, DOWN, FOLLOWING, AFTER, CONV_STATE, STATE, MIXER = range(10)  # columns of the table


class Block(NamedTuple):
    """Where a block's numbers lie, all of them contiguous float32.

    mixer: its weights between the projections, in the order of its ``step_weights``. states: of the convolution and
    the scan, overwritten. inputs, project: its input and output projections ``[S, E]``, ``[E, D]``. norm, following:
    the RMSNorm before the MLP and the one behind the block ``[E]``, and their eps. mlp: gate, up ``[I, E]``, down
    ``[E, I]``. after: the input projection of the next mixer ``[S, E]``; None where the chain ends with the norm.
    """

    mixer: Sequence[Tensor]
    states: tuple[Tensor, Tensor]
    inputs: Tensor
    project: Tensor
    norm: tuple[Tensor, float]
    mlp: tuple[Tensor, Tensor, Tensor]
    following: tuple[Tensor, float]
    after: Tensor | None

    def shapes(self) -> list[torch.Size]:
        """Those of a chain's blocks are the same."""
        return [each.shape for each in (*self.mixer, *self.states, self.inputs, self.project, self.mlp[0])]


@intrinsic
def _pointer(typing, address):
    """An address as a pointer to float32."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@jit
def _flat(address, count):
    return carray(_pointer(address), (count,))


@jit
def _matrix(address, rows, columns):
    return carray(_pointer(address), (rows, columns))


@jit
def _rows(flat, rows, width):
    return flat[: rows * width].reshape((rows, width))


@jit
def _states(address, begin, rows, channels, width):
    """Rows ``begin`` and following of states ``[B, channels, width]``."""
    return carray(_pointer(address + 4 * begin * channels * width), (rows, channels, width))


@jit
def _finish(table, place, eps, sizes, rows, begin, hidden, y, mixed, carry, carried):
    """What follows block ``place``'s mixer for ``rows`` rows: ``hidden`` [rows * E] in place, and into ``carry`` what
    the next mixer starts from; the last block's goes into ``carried``, from row ``begin`` on."""
    width, inner, mixing, projected, end = sizes
    at, last = table[place], place + 1 == len(table)
    out, to = (end, carried[begin * end :]) if last else (projected, carry)
    _product(y, rows, mixing, _flat(at[PROJECT], width * mixing), width, mixed)
    _rest(
        0, rows, hidden, mixed, _flat(at[NORM], width), eps[place, 0], _flat(at[GATE], inner * width),
        _flat(at[UP], inner * width), _flat(at[DOWN], width * inner), _flat(at[FOLLOWING], width), eps[place, 1],
        _flat(at[AFTER], 0 if at[AFTER] == 0 else out * width), (width, inner, out), hidden, to,
    )  # fmt: skip


@jit
def _mamba1_chain(first, last, hidden, carry, table, eps, sizes, source, rank, states, before, carried):
    """Rows ``first .. last - 1``; ``hidden`` [B * E] is overwritten."""
    width, _, mixing, projected, _ = sizes
    taps, groups, some = len(before) + 1, mixing // len(states), min(ROWS, last - first)
    now, low = np.empty(some * projected, hidden.dtype), np.empty(some * rank, hidden.dtype)
    dt, y = np.empty(some * mixing, hidden.dtype), np.empty(some * mixing, hidden.dtype)
    mixed = np.empty(some * width, hidden.dtype)
    for begin in range(first, last, ROWS):
        rows = min(ROWS, last - begin)
        now[: rows * projected] = carry[begin * projected : (begin + rows) * projected]
        for place in range(len(table)):
            at = table[place]
            for b in range(rows):
                low[b * rank : (b + 1) * rank] = now[(b + 1) * projected - rank : (b + 1) * projected]
            _product(low, rows, rank, _flat(at[MIXER + 2], mixing * rank), mixing, dt)
            bias = _flat(at[MIXER + 3], mixing)
            for b in range(rows):
                row = dt[b * mixing : (b + 1) * mixing]
                for d in range(mixing):
                    row[d] = softplus(row[d] + bias[d])
            _mamba1(
                0, groups, _rows(now, rows, projected), _rows(dt, rows, mixing), _matrix(at[MIXER], mixing, taps),
                _flat(at[MIXER + 1], mixing), _matrix(at[MIXER + 4], mixing, len(states)),
                _flat(at[MIXER + 5], mixing), source, _states(at[CONV_STATE], begin, rows, mixing, taps - 1),
                _states(at[STATE], begin, rows, mixing, len(states)), _rows(y, rows, mixing), states, before,
            )  # fmt: skip
            _finish(table, place, eps, sizes, rows, begin, hidden[begin * width :], y, mixed, now, carried)


@jit
def _mamba1_chain_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _mamba1_chain, arguments)


@jit
def _mamba2_chain(first, last, hidden, carry, table, eps, sizes, norm_eps, states, before, carried):
    """Rows ``first .. last - 1``; ``hidden`` [B * E] is overwritten."""
    width, _, mixing, projected, _ = sizes
    taps, heads, some = len(before) + 1, mixing // len(states), min(ROWS, last - first)
    now, y = np.empty(some * projected, hidden.dtype), np.empty(some * mixing, hidden.dtype)
    mixed = np.empty(some * width, hidden.dtype)
    for begin in range(first, last, ROWS):
        rows = min(ROWS, last - begin)
        now[: rows * projected] = carry[begin * projected : (begin + rows) * projected]
        for place in range(len(table)):
            at = table[place]
            state = _states(at[STATE], begin, rows, mixing, len(states))
            _mamba2(
                0, heads, _rows(now, rows, projected), _matrix(at[MIXER], 3 * mixing, taps),
                _flat(at[MIXER + 1], 3 * mixing), _flat(at[MIXER + 2], heads), _flat(at[MIXER + 3], heads),
                _flat(at[MIXER + 4], heads), _flat(at[MIXER + 5], mixing), norm_eps,
                _states(at[CONV_STATE], begin, rows, 3 * mixing, taps - 1),
                state.reshape((rows, heads, len(states), len(states))), _rows(y, rows, mixing), states, before,
            )  # fmt: skip
            _finish(table, place, eps, sizes, rows, begin, hidden[begin * width :], y, mixed, now, carried)


@jit
def _mamba2_chain_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _mamba2_chain, arguments)


def mamba1(
    hidden: Tensor, carry: Tensor, blocks: Sequence[Block], heads: tuple[int, int], faithful: bool
) -> tuple[Tensor, Tensor]:
    """Through ``blocks`` of mamba1: the hidden states ``[B, E]`` behind the last, and what the next mixer starts from.

    Args:
        hidden: ``[B, E]``, before the first block. carry: ``[B, S]``, its mixer's input projection of their norm.
        heads, faithful: as in `decode_cpu.mamba1`.
    """
    _, mixing, states = blocks[0].states[1].shape
    taps, rank = blocks[0].mixer[0].shape[-1], blocks[0].mixer[2].shape[1]
    source = sources(*heads, mixing // heads[0] // states, faithful)
    own = (source, rank, width_of(states), width_of(taps - 1))
    return _chain(_mamba1_chain_team, hidden, carry, blocks, mixing, mixing * states, own)


def mamba2(hidden: Tensor, carry: Tensor, blocks: Sequence[Block], eps: float) -> tuple[Tensor, Tensor]:
    """`mamba1` for blocks of mamba2, whose gated norms have ``eps``."""
    _, heads, states, _ = blocks[0].states[1].shape
    own = (np.float32(eps), width_of(states), width_of(blocks[0].mixer[0].shape[-1] - 1))
    return _chain(_mamba2_chain_team, hidden, carry, blocks, heads * states, heads * states * states // 3, own)


def _chain(
    team: Any, hidden: Tensor, carry: Tensor, blocks: Sequence[Block], mixing: int, work: int, own: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """``work``: numbers of state a row, as `spread` counts. own: arguments that only this kind of mixer has."""
    batch, width = hidden.shape
    if any(block.shapes() != blocks[0].shapes() for block in blocks) or len(blocks[0].states[0]) != batch:
        raise ValueError(f"blocks of a chain have the same shapes, and states of {batch} rows")
    inner, after = blocks[0].mlp[0].shape[0], blocks[-1].after
    table = np.array([_addresses(block) for block in blocks])
    eps = np.array([(block.norm[1], block.following[1]) for block in blocks], np.float32)
    sizes = (width, inner, mixing, carry.shape[1], width if after is None else after.shape[0])
    out = hidden.clone(memory_format=torch.contiguous_format)
    carried = torch.empty(batch, sizes[-1], dtype=torch.float32, device="cpu")
    arrays = (out.numpy().reshape(-1), array(carry, torch.float32).reshape(-1), table, eps, sizes)
    spread(team, batch, batch * len(blocks) * (work + width * inner // 8), *arrays, *own, carried.numpy().reshape(-1))
    return out, carried


def _addresses(block: Block) -> list[int]:
    """A row of the table."""
    after = block.after.data_ptr() if block.after is not None else 0
    before = (block.project, block.norm[0], *block.mlp, block.following[0])
    return [*(t.data_ptr() for t in before), after, *(t.data_ptr() for t in (*block.states, *block.mixer))]
