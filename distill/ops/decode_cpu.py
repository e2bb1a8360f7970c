"""One token of a whole mixer on CPU, between its projections, in one compiled pass.

Decoding a small model spends its time around the work: some thirty PyTorch calls a mixer become one. Float32 only; the
mixers' own code, operator by operator, is the reference and serves every other case.

    B = batch, D = d_inner, N = states a channel (and channels of a group), H = heads, P = head_dim, K = taps
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.ops.cpu import array, exp, jit, spread, width_of
from distill.ops.openmp import parallel


@jit
def _shift(state, taps, bias, value, before):
    """The convolution of one channel, before the SiLU; ``state [K-1]``, as long as ``before``, takes ``value`` in."""
    last = len(before)
    total = bias + taps[last] * value
    for k in range(last):
        old = state[k]
        total += taps[k] * old
        if k > 0:
            state[k - 1] = old
    state[last - 1] = value
    return total


@jit
def _mamba1(first, last, projected, dt, taps, bias, A_log, D, source, conv_state, state, y, width, before):
    """Groups ``first .. last - 1`` of every row; shapes as in `mamba1`, source: the chunk of x and B of a group."""
    N, inner = len(width), state.shape[1]
    at_x = inner
    at_b = at_x + (source.max() + 1) * N
    at_c = at_b + at_b - at_x
    one, zero = dt.dtype.type(1), dt.dtype.type(0)
    A = np.empty((N, N), dt.dtype)
    rows = np.empty((4, N), dt.dtype)  # u | gate | B | C
    for group in range(first, last):
        chunk, start = source[group] * N, group * N
        for p in range(N):
            for n in range(N):
                A[p, n] = -exp(A_log[start + p, n])
        for b in range(y.shape[0]):
            for p in range(N):
                d = start + p
                rows[0, p] = _shift(conv_state[b, d], taps[d], bias[d], projected[b, at_x + chunk + p], before)
                rows[1, p] = projected[b, d]
                rows[2, p] = projected[b, at_b + chunk + p]
                rows[3, p] = projected[b, at_c + d]
            for p in range(N):
                rows[0, p] = rows[0, p] / (one + exp(-rows[0, p]))
            for p in range(N):
                rows[1, p] = rows[1, p] / (one + exp(-rows[1, p]))
            for p in range(N):
                d = start + p
                step = dt[b, d]
                inflow = step * rows[0, p]
                total = zero
                for n in range(N):
                    h = exp(step * A[p, n]) * state[b, d, n] + inflow * rows[2, n]
                    state[b, d, n] = h
                    total += h * rows[3, n]
                y[b, d] = (total + D[d] * rows[0, p]) * rows[1, p]


@jit
def _mamba1_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _mamba1, arguments)


@functools.cache
def sources(heads: int, kv_heads: int, chunks: int, faithful: bool) -> Any:
    """The key/value-sized chunk that each of ``heads * chunks`` groups reads (``Mixer._expand`` as a table)."""
    table = torch.arange(kv_heads * chunks, device="cpu")
    repeat = heads // kv_heads
    if faithful:
        return table.repeat_interleave(repeat).numpy()
    return table.view(kv_heads, chunks).repeat_interleave(repeat, dim=0).flatten().numpy()


def mamba1(
    projected: Tensor,
    dt: Tensor,
    taps: Tensor,
    bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_state: Tensor,
    state: Tensor,
    heads: tuple[int, int],
    *,
    faithful: bool,
) -> Tensor:
    """y * SiLU(z) ``[B, D]`` of one token; both states are overwritten.

    Args:
        projected: ``[B, S]``, rows of ``in_proj``: z, x, B, C and more. dt: ``[B, D]``, after the softplus.
        taps: ``[D, K]``. bias: ``[D]``. A_log: ``[D, N]``. D: ``[D]``.
        conv_state: ``[B, D, K-1]``. state: ``[B, D, N]``.
        heads: query heads and key/value heads. faithful: which expansion, see ``Mixer._expand``.
    """
    batch, inner, states = state.shape
    source = sources(*heads, inner // heads[0] // states, faithful)
    arrays = [array(t, torch.float32) for t in (projected, dt, taps, bias, A_log, D)]
    y = torch.empty(batch, inner, dtype=torch.float32, device="cpu")  # whatever the defaults are
    views = (conv_state.numpy(), state.numpy(), y.numpy())
    spread(
        _mamba1_team,
        inner // states,
        state.numel(),
        *arrays,
        source,
        *views,
        width_of(states),
        width_of(taps.shape[1] - 1),
    )
    return y


@jit
def _mamba2(first, last, projected, taps, bias, dt_bias, A_log, D, weight, eps, conv_state, state, y, width, before):
    """Heads ``first .. last - 1`` of every row; shapes as in `mamba2`."""
    P, inner = len(width), y.shape[1]
    one, zero = y.dtype.type(1), y.dtype.type(0)
    rows = np.empty((5, P), y.dtype)  # x | B | C | gate | y
    for head in range(first, last):
        A, start = -exp(A_log[head]), head * P
        for b in range(y.shape[0]):
            raw = projected[b, 4 * inner + head] + dt_bias[head]
            step = raw if raw > 20 else y.dtype.type(math.log1p(exp(raw)))
            decay = exp(step * A)
            for part in range(3):
                for p in range(P):
                    c = part * inner + start + p
                    rows[part, p] = _shift(conv_state[b, c], taps[c], bias[c], projected[b, inner + c], before)
            for p in range(P):
                rows[3, p] = projected[b, start + p]
            for part in range(4):
                for p in range(P):
                    rows[part, p] = rows[part, p] / (one + exp(-rows[part, p]))
            for p in range(P):
                inflow = step * rows[0, p]
                total = zero
                for n in range(P):
                    h = decay * state[b, head, p, n] + inflow * rows[1, n]
                    state[b, head, p, n] = h
                    total += h * rows[2, n]
                rows[4, p] = (total + D[head] * rows[0, p]) * rows[3, p]
            square = zero
            for p in range(P):
                square += rows[4, p] * rows[4, p]
            scale = one / math.sqrt(square / y.dtype.type(P) + eps)
            for p in range(P):
                y[b, start + p] = rows[4, p] * scale * weight[start + p]


@jit
def _mamba2_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _mamba2, arguments)


def mamba2(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    weight: Tensor,
    eps: float,
    conv_state: Tensor,
    state: Tensor,
) -> Tensor:
    """norm(y * SiLU(z)) ``[B, D]`` of one token; both states are overwritten.

    Args:
        projected: ``[B, 4 D + H]``, rows of ``in_proj``: z, x, B, C, dt.
        taps: ``[3 D, K]``. bias: ``[3 D]``. dt_bias, A_log, D: ``[H]``. weight: of the norm, ``[D]``; eps: its own.
        conv_state: ``[B, 3 D, K-1]``. state: ``[B, H, P, P]``.
    """
    batch, heads, width, _ = state.shape
    arrays = [array(t, torch.float32) for t in (projected, taps, bias, dt_bias, A_log, D, weight)]
    y = torch.empty(batch, heads * width, dtype=torch.float32, device="cpu")
    views = (conv_state.numpy(), state.numpy(), y.numpy(), width_of(width), width_of(taps.shape[1] - 1))
    work = state.numel() // 3  # as mamba1 counts: no exponential for each number of the state
    spread(_mamba2_team, heads, work, *arrays, np.float32(eps), *views)
    return y
