"""The selective scan on CPU: numba kernels (no compiler needed) behind a hand-written autograd function.

    B = batch, T = tokens, D = channels, N = states per channel, G = groups, P = D/G channels of a group

A task is one (batch row, group); it owns every output it writes, so the bits do not depend on how tasks are
spread over threads. The groups of a row are taken together, chunk by chunk of tokens: one by one, each would go through
all of memory in strides of a whole token.

What makes the inner loops vectorise: N is a compile-time constant (the length of the tuple ``width``), and
what a loop writes lies beside what it reads in one scratch array, at multiples of N, so that few overlap
checks remain.

Backward (g is the gradient of h, a = exp(dt A), from the last token to the first):
    g_t  = C_t dy_t + a_{t+1} g_{t+1}                 dx_t  = D dy_t + dt_t (g_t . B_t)
    dC_t = sum_P dy_t h_t,  dB_t = sum_P g_t dt_t x_t      ddt_t = g_t . (A a_t h_{t-1} + B_t x_t)
    dA   = sum_t g_t dt_t a_t h_{t-1}                 dD    = sum_t dy_t x_t
Forward keeps h every CHECKPOINT_EVERY tokens; backward recomputes the rest, chunk by chunk.
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.ops.cpu import array, exp, jit, spread, width_of
from distill.ops.openmp import parallel
from distill.ops.selective_scan_reference import compute_dtype

CHECKPOINT_EVERY = 32
_NO_RESET = np.empty((0, 0), dtype=np.bool_)


@jit
def _forward(first, last, x, dt, A, B, C, D, reset, state, y, checkpoints, width, every):
    """Tasks ``first .. last - 1``; overwrites ``state``; an empty ``reset`` or ``checkpoints`` means none."""
    N, T, G = len(width), x.shape[1], B.shape[2]
    P = A.shape[0] // G
    zero = x.dtype.type(0)
    rows = np.empty((P, 2 * N), x.dtype)  # h | A
    task = first
    while task < last:
        b, upto = task // G, min(last, (task // G + 1) * G)
        for start in range(0, T, every):
            for group in range(task - b * G, upto - b * G):
                for p in range(P):
                    for n in range(N):
                        rows[p, n] = state[b, group * P + p, n]
                        rows[p, N + n] = A[group * P + p, n]
                for t in range(start, min(start + every, T)):
                    if reset.size and reset[b, t]:
                        for p in range(P):
                            for n in range(N):
                                rows[p, n] = zero
                    if checkpoints.size and t % every == 0:
                        for p in range(P):
                            for n in range(N):
                                checkpoints[b, t // every, group * P + p, n] = rows[p, n]
                    for p in range(P):
                        d = group * P + p
                        step, value = dt[b, t, d], x[b, t, d]
                        inflow = step * value
                        total = zero
                        for n in range(N):
                            h = exp(step * rows[p, N + n]) * rows[p, n] + inflow * B[b, t, group, n]
                            rows[p, n] = h
                            total += h * C[b, t, group, n]
                        y[b, t, d] = total + D[d] * value
                for p in range(P):
                    for n in range(N):
                        state[b, group * P + p, n] = rows[p, n]
        task = upto


@jit
def _forward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _forward, arguments)


@jit
def _backward(first, last, x, dt, A, B, C, D, reset, checkpoints, dy, dx, ddt, dA, dB, dC, dD, dstate, width, every):
    """Tasks ``first .. last - 1``; dA ``[B, D, N]`` and dD ``[B, D]`` are summed by the caller."""
    N, T, G = len(width), x.shape[1], B.shape[2]
    P = A.shape[0] // G
    zero = x.dtype.type(0)
    rows = np.empty((P, 3 * N), x.dtype)  # g | A | dA
    vectors = np.empty((every, 4 * N), x.dtype)  # B | C | dB | dC
    past = np.empty((every, P, 2 * N), x.dtype)  # a_t | h_{t-1}
    h = np.empty((P, N), x.dtype)
    task = first
    while task < last:
        b, upto = task // G, min(last, (task // G + 1) * G)
        for d in range((task - b * G) * P, (upto - b * G) * P):
            dD[b, d] = zero
            for n in range(N):
                dstate[b, d, n] = zero
                dA[b, d, n] = zero
        for chunk in range((T - 1) // every, -1, -1):
            start = chunk * every
            length = min(every, T - start)
            for group in range(task - b * G, upto - b * G):
                for p in range(P):
                    for n in range(N):
                        rows[p, n] = dstate[b, group * P + p, n]
                        rows[p, N + n] = A[group * P + p, n]
                        rows[p, 2 * N + n] = dA[b, group * P + p, n]
                        h[p, n] = checkpoints[b, chunk, group * P + p, n]
                for i in range(length):
                    t = start + i
                    for n in range(N):
                        vectors[i, n] = B[b, t, group, n]
                        vectors[i, N + n] = C[b, t, group, n]
                        vectors[i, 2 * N + n] = zero
                        vectors[i, 3 * N + n] = zero
                    if reset.size and reset[b, t]:
                        for p in range(P):
                            for n in range(N):
                                h[p, n] = zero
                    for p in range(P):
                        step = dt[b, t, group * P + p]
                        inflow = step * x[b, t, group * P + p]
                        for n in range(N):
                            a = exp(step * rows[p, N + n])
                            past[i, p, n] = a
                            past[i, p, N + n] = h[p, n]
                            h[p, n] = a * h[p, n] + inflow * vectors[i, n]
                for i in range(length - 1, -1, -1):
                    t = start + i
                    for p in range(P):
                        d = group * P + p
                        step, value, dout = dt[b, t, d], x[b, t, d], dy[b, t, d]
                        inflow = step * value
                        through_B = zero
                        through_A = zero
                        for n in range(N):
                            a = past[i, p, n]
                            kept = a * past[i, p, N + n]
                            g = rows[p, n] + dout * vectors[i, N + n]
                            vectors[i, 2 * N + n] += g * inflow
                            vectors[i, 3 * N + n] += dout * (kept + inflow * vectors[i, n])
                            through_B += g * vectors[i, n]
                            through_A += g * kept * rows[p, N + n]
                            rows[p, 2 * N + n] += g * kept * step
                            rows[p, n] = g * a
                        dx[b, t, d] = D[d] * dout + step * through_B
                        ddt[b, t, d] = through_A + value * through_B
                        dD[b, d] += dout * value
                    if reset.size and reset[b, t]:
                        for p in range(P):
                            for n in range(N):
                                rows[p, n] = zero
                    for n in range(N):
                        dB[b, t, group, n] = vectors[i, 2 * N + n]
                        dC[b, t, group, n] = vectors[i, 3 * N + n]
                for p in range(P):
                    for n in range(N):
                        dstate[b, group * P + p, n] = rows[p, n]
                        dA[b, group * P + p, n] = rows[p, 2 * N + n]
        task = upto


@jit
def _backward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _backward, arguments)


@jit
def _update(first, last, x, dt, A, B, C, D, state, y, width):
    """One token of tasks ``first .. last - 1``; ``state`` is overwritten."""
    N, G = len(width), B.shape[1]
    P = A.shape[0] // G
    zero = x.dtype.type(0)
    for task in range(first, last):
        b, group = task // G, task % G
        for p in range(P):
            d = group * P + p
            inflow = dt[b, d] * x[b, d]
            total = zero
            for n in range(N):
                h = exp(dt[b, d] * A[d, n]) * state[b, d, n] + inflow * B[b, group, n]
                state[b, d, n] = h
                total += h * C[b, group, n]
            y[b, d] = total + D[d] * x[b, d]


@jit
def _update_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _update, arguments)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` on CPU tensors that have been checked; shapes as there."""
    operands = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        y, state = _Scan.apply(x, dt, A, B, C, D, reset, initial_state)
        return y, state
    y, state, _ = _run_forward(x, dt, A, B, C, D, reset, initial_state, keep=False)
    return y, state


def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`selective_scan_update` on CPU tensors that have been checked; shapes as there."""
    arrays = [array(tensor, state.dtype) for tensor in (x, dt, A, B, C, D, state)]
    y = np.empty_like(arrays[0])
    spread(_update_team, x.shape[0] * B.shape[1], state.numel(), *arrays, y, width_of(A.shape[1]))
    out = torch.from_numpy(y)
    return out if out.dtype == x.dtype else out.to(x.dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state, checkpoints = _run_forward(*operands, keep=True)  # type: ignore[arg-type]
        ctx.save_for_backward(*operands, checkpoints)
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *operands, checkpoints = ctx.saved_tensors
        x, dt, A, B, C, D, reset, _initial_state = operands
        dtype = checkpoints.dtype
        x_, dt_, A_, B_, C_, D_, dy_ = (array(tensor, dtype) for tensor in (x, dt, A, B, C, D, dy))
        batch = x.shape[0]
        dx, ddt, dB, dC = (np.empty_like(array) for array in (x_, dt_, B_, C_))
        dA, dstate = (np.empty((batch, *A_.shape), A_.dtype) for _ in range(2))
        dD = np.empty((batch, *D_.shape), D_.dtype)
        reset_ = _NO_RESET if reset is None else reset.contiguous().numpy()
        inputs = (x_, dt_, A_, B_, C_, D_, reset_, checkpoints.numpy(), dy_)
        outputs = (dx, ddt, dA, dB, dC, dD, dstate)
        work = x.numel() * A.shape[1]
        spread(
            _backward_team,
            batch * B.shape[2],
            work,
            *inputs,
            *outputs,
            width_of(A.shape[1]),
            CHECKPOINT_EVERY,
        )
        # numpy adds the batch rows one after the other, whatever the thread count.
        grads = (dx, ddt, dA.sum(axis=0), dB, dC, dD.sum(axis=0), None, dstate)
        return tuple(
            torch.from_numpy(grad).to(operand.dtype) if needed and grad is not None else None
            for grad, operand, needed in zip(grads, operands, ctx.needs_input_grad, strict=True)
        )


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    reset: Tensor | None,
    initial_state: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final state and, if ``keep``, the states ``[B, chunks, D, N]`` at chunk starts."""
    dtype = compute_dtype(x, dt, A, B, C, D)
    batch, steps, channels = x.shape
    states = A.shape[1]
    y = torch.empty(x.shape, dtype=dtype, device="cpu")
    state = torch.zeros(batch, channels, states, dtype=dtype, device="cpu")
    if initial_state is not None:
        state.copy_(initial_state.detach())
    chunks = -(-steps // CHECKPOINT_EVERY) if keep else 0
    checkpoints = torch.empty(batch, chunks, channels, states, dtype=dtype, device="cpu")
    arrays = [array(tensor, dtype) for tensor in (x, dt, A, B, C, D)]
    arrays.append(_NO_RESET if reset is None else reset.contiguous().numpy())
    arrays += [state.numpy(), y.numpy(), checkpoints.numpy()]
    spread(_forward_team, batch * B.shape[2], x.numel() * states, *arrays, width_of(states), CHECKPOINT_EVERY)
    return y.to(x.dtype), state, checkpoints
