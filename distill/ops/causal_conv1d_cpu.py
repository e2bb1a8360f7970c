"""The causal convolution on CPU: numba kernels behind a hand-written autograd function.

    B = batch, T = tokens, D = channels, K = taps

A task is one (batch row, segment of tokens) and owns every output it writes; segments are the same whatever the
threads, and so are the bits. Whole rows of channels are the inner loops: of a row that is a view of its own, numba
knows that neighbours lie side by side. Backward keeps nothing but the inputs: the sum before the SiLU is made again.

With s the sigmoid of the sum a, g = dy s (1 + a (1 - s)):
    dx_t = sum_k weight[:, K-1-k] g_{t+k},  dweight[:, K-1-k] = sum_t g_t x_{t-k},  dbias = sum_t g_t
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.ops.causal_conv1d_reference import update
from distill.ops.cpu import array, exp, jit, spread
from distill.ops.openmp import parallel

__all__ = ["conv", "update"]

SEGMENT = 128  # tokens a task
_NO_RESET = np.empty((0, 0), dtype=np.bool_)


@jit
def _next(age, reset, b, t, taps):
    """How many tokens before t are of its document, as far as taps reach, from what it was at the token before."""
    return 0 if reset.size and reset[b, t] else min(age + 1, taps.shape[0] - 1)


@jit
def _before(start, reset, b, taps):
    """The same of the token before ``start``."""
    age = taps.shape[0] - 1
    for t in range(max(0, start - age), start):
        age = _next(age, reset, b, t, taps)
    return age


@jit
def _sum(total, rows, taps, bias, t, age):
    """Bias and taps ``[K, D]`` over token t and ``age`` tokens before it, into ``total [D]``; rows ``[K-1+T, D]``."""
    K = taps.shape[0]
    row, weight = rows[t + K - 1], taps[K - 1]
    for d in range(total.size):
        total[d] = bias[d] + weight[d] * row[d]
    for back in range(1, age + 1):
        row, weight = rows[t + K - 1 - back], taps[K - 1 - back]
        for d in range(total.size):
            total[d] += weight[d] * row[d]


@jit
def _forward(first, last, padded, taps, bias, reset, y, ages):
    """Tasks ``first .. last - 1``. padded ``[B, K-1+T, D]``; an empty reset means none; ages ``[B]``: `_before` T."""
    T, D = y.shape[1:]
    segments = -(-T // SEGMENT)
    one = padded.dtype.type(1)
    total = np.empty(D, padded.dtype)
    for task in range(first, last):
        b, start = task // segments, task % segments * SEGMENT
        rows, age = padded[b], _before(start, reset, b, taps)
        for t in range(start, min(start + SEGMENT, T)):
            age = _next(age, reset, b, t, taps)
            _sum(total, rows, taps, bias, t, age)
            out = y[b, t]
            for d in range(D):
                out[d] = total[d] / (one + exp(-total[d]))
        if start + SEGMENT >= T:
            ages[b] = age


@jit
def _forward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _forward, arguments)


@jit
def _backward(first, last, padded, taps, bias, reset, dy, dpadded, dtaps, dbias):
    """Tasks ``first .. last - 1``. dtaps ``[tasks, K, D]`` and dbias ``[tasks, D]`` are summed by the caller; all that
    is written comes in as zeros. Tokens up to K-1 behind the segment are made again for what they send into it."""
    T, D = dy.shape[1:]
    K = taps.shape[0]
    segments = -(-T // SEGMENT)
    one = padded.dtype.type(1)
    total = np.empty(D, padded.dtype)
    for task in range(first, last):
        b, start = task // segments, task % segments * SEGMENT
        end = min(start + SEGMENT, T)
        rows, into, age = padded[b], dpadded[b], _before(start, reset, b, taps)
        into_bias = dbias[task]
        for t in range(start, min(end + K - 1, T)):
            age = _next(age, reset, b, t, taps)
            if t - age >= end:
                break  # a document starts behind the segment
            _sum(total, rows, taps, bias, t, age)
            out = dy[b, t]
            for d in range(D):
                s = one / (one + exp(-total[d]))
                total[d] = out[d] * s * (one + total[d] * (one - s))
            for back in range(age + 1):
                at = t - back
                if at < end and (at >= start or start == 0):
                    into_row, weight = into[at + K - 1], taps[K - 1 - back]
                    for d in range(D):
                        into_row[d] += weight[d] * total[d]
                if t < end:
                    into_weight, row = dtaps[task, K - 1 - back], rows[at + K - 1]
                    for d in range(D):
                        into_weight[d] += row[d] * total[d]
            if t < end:
                for d in range(D):
                    into_bias[d] += total[d]


@jit
def _backward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _backward, arguments)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`distill.ops.causal_conv1d.causal_conv1d` on CPU tensors that have been checked; shapes as there."""
    operands = (x, weight, bias, reset, initial_state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        y, state = _Conv.apply(*operands)
        return y, state
    return _run_forward(*operands)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final = _run_forward(*operands)  # type: ignore[arg-type]
        ctx.save_for_backward(*operands)
        ctx.mark_non_differentiable(final)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        x, weight = operands[:2]
        inputs = _arrays(*operands)
        padded, taps, bias, _reset = inputs
        dpadded = np.zeros_like(padded)
        dtaps, dbias = (np.zeros((_tasks(x), *values.shape), padded.dtype) for values in (taps, bias))
        outputs = (array(dy, _dtype(x, weight)), dpadded, dtaps, dbias)
        spread(_backward_team, _tasks(x), x.numel() * len(taps), *inputs, *outputs)
        before = len(taps) - 1
        # numpy adds the tasks one after the other, whatever the thread count.
        grads = (dpadded[:, before:], dtaps.sum(axis=0).T, dbias.sum(axis=0), None, dpadded[:, :before].swapaxes(1, 2))
        return tuple(
            torch.from_numpy(grad).to(operand.dtype) if needed and grad is not None else None
            for grad, operand, needed in zip(grads, operands, ctx.needs_input_grad, strict=True)
        )


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _tasks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[1] // SEGMENT)


def _arrays(x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None, initial_state: Tensor | None) -> list[Any]:
    """The state and x ``[B, K-1+T, D]``, taps ``[K, D]``, bias ``[D]`` and reset, as the kernels take them."""
    batch, steps, channels = x.shape
    before, dtype = weight.shape[1] - 1, _dtype(x, weight)
    padded = torch.empty(batch, before + steps, channels, dtype=dtype, device="cpu")
    # The state in x's precision, as it would have come in with x.
    padded[:, :before] = 0 if initial_state is None else initial_state.detach().to(x.dtype).transpose(1, 2)
    padded[:, before:] = x.detach()
    marks = _NO_RESET if reset is None else reset.contiguous().numpy()
    return [padded.numpy(), array(weight.T, dtype), array(bias, dtype), marks]


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = _arrays(x, weight, bias, reset, initial_state)
    padded, before = inputs[0], weight.shape[1] - 1
    y = torch.empty(x.shape, dtype=_dtype(x, weight), device="cpu")
    ages = np.empty(x.shape[0], np.int64)
    spread(_forward_team, _tasks(x), x.numel() * weight.shape[1], *inputs, y.numpy(), ages)
    behind = torch.arange(before - 1, -1, -1, device="cpu")  # tokens behind the last one, the oldest first
    final = torch.from_numpy(padded[:, padded.shape[1] - before :]).transpose(1, 2)
    final = final.masked_fill((behind > torch.from_numpy(ages)[:, None])[:, None], 0)
    return y.to(x.dtype), final.to(x.dtype)
