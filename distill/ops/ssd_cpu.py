"""State space duality on CPU: the recurrence, compiled, forward and backward; and its single-token update.

The matrix form of `distill.ops.ssd_chunked` pays where there are matrix units. A core does the recurrence's
multiply-adds as fast as a product's, and needs neither the [Q, Q] blocks of exponentials nor the memory for them.

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C

A task is one (batch row, head); it owns every output it writes, so the bits do not depend on how tasks are spread over
threads. The heads of a row are taken together, chunk by chunk of tokens, as memory holds them.

Backward (g is the gradient of h, a = exp(dt A), u = dt x, from the last token to the first):
    g_t  = dy_t C_t^T + a_{t+1} g_{t+1}      du_t = g_t B_t          dx_t = D dy_t + dt_t du_t
    dC_t = h_t^T dy_t,  dB_t = g_t^T u_t     da_t = sum g_t h_{t-1}  ddt_t = A a_t da_t + x_t . du_t
    dA   = sum_t dt_t a_t da_t               dD   = sum_t dy_t . x_t
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
    N = len(width)
    T, H, P = x.shape[1:]
    share = H // B.shape[2]
    zero = x.dtype.type(0)
    vectors = np.empty(2 * N, x.dtype)  # B | C
    task = first
    while task < last:
        b, upto = task // H, min(last, (task // H + 1) * H)
        for start in range(0, T, every):
            for head in range(task - b * H, upto - b * H):
                h = state[b, head]
                for t in range(start, min(start + every, T)):
                    if reset.size and reset[b, t]:
                        h[:] = zero
                    if checkpoints.size and t % every == 0:
                        checkpoints[b, t // every, head] = h
                    for n in range(N):
                        vectors[n] = B[b, t, head // share, n]
                        vectors[N + n] = C[b, t, head // share, n]
                    step = dt[b, t, head]
                    decay = exp(step * A[head])
                    for p in range(P):
                        value = x[b, t, head, p]
                        inflow, total = step * value, zero
                        for n in range(N):
                            new = decay * h[p, n] + inflow * vectors[n]
                            h[p, n] = new
                            total += new * vectors[N + n]
                        y[b, t, head, p] = total + D[head] * value
        task = upto


@jit
def _forward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _forward, arguments)


@jit
def _backward(first, last, x, dt, A, B, C, D, reset, checkpoints, dy, dx, ddt, dB, dC, sums, dstate, every):
    """Tasks ``first .. last - 1``. dB and dC ``[B, T, H, N]`` are summed by the caller, and so are ``sums [B, H, 2]``
    of dA and dD, which come in as zeros, in float64: over a long document float32 loses what single tokens add."""
    N = B.shape[3]
    T, H, P = x.shape[1:]
    share = H // B.shape[2]
    zero = x.dtype.type(0)
    past = np.empty((every + 1, P, N), x.dtype)  # h before the chunk and after each of its tokens
    rows = np.empty((P, N), x.dtype)  # g
    vectors = np.empty((every, 4 * N), x.dtype)  # B | C | dB | dC
    task = first
    while task < last:
        b, upto = task // H, min(last, (task // H + 1) * H)
        for head in range(task - b * H, upto - b * H):
            for p in range(P):
                for n in range(N):
                    dstate[b, head, p, n] = zero
        for chunk in range((T - 1) // every, -1, -1):
            start = chunk * every
            length = min(every, T - start)
            for head in range(task - b * H, upto - b * H):
                for p in range(P):
                    for n in range(N):
                        past[0, p, n] = checkpoints[b, chunk, head, p, n]
                        rows[p, n] = dstate[b, head, p, n]
                for i in range(length):
                    t = start + i
                    for n in range(N):
                        vectors[i, n] = B[b, t, head // share, n]
                        vectors[i, N + n] = C[b, t, head // share, n]
                        vectors[i, 2 * N + n] = zero
                        vectors[i, 3 * N + n] = zero
                    step = dt[b, t, head]
                    decay = exp(step * A[head])
                    begins = reset.size and reset[b, t]
                    for p in range(P):
                        inflow = step * x[b, t, head, p]
                        if begins:
                            for n in range(N):
                                past[i + 1, p, n] = inflow * vectors[i, n]
                        else:
                            for n in range(N):
                                past[i + 1, p, n] = decay * past[i, p, n] + inflow * vectors[i, n]
                for i in range(length - 1, -1, -1):
                    t = start + i
                    step = dt[b, t, head]
                    decay = exp(step * A[head])
                    begins = reset.size and reset[b, t]
                    through_a, through_dt, through_D = zero, zero, zero
                    for p in range(P):
                        value, dout = x[b, t, head, p], dy[b, t, head, p]
                        inflow = step * value
                        through, kept = zero, zero
                        # Three loops, so that in each few arrays could overlap: or they would not vectorise.
                        for n in range(N):
                            g = rows[p, n] + dout * vectors[i, N + n]
                            rows[p, n] = g
                            through += g * vectors[i, n]
                            kept += g * past[i, p, n]
                        for n in range(N):
                            vectors[i, 2 * N + n] += rows[p, n] * inflow
                            vectors[i, 3 * N + n] += dout * past[i + 1, p, n]
                        for n in range(N):
                            rows[p, n] *= decay
                        dx[b, t, head, p] = D[head] * dout + step * through
                        through_dt += value * through
                        through_D += dout * value
                        if begins:  # a select and not a product: the other document may hold inf or NaN
                            for n in range(N):
                                rows[p, n] = zero
                        else:
                            through_a += kept
                    through_a *= decay
                    ddt[b, t, head] = A[head] * through_a + through_dt
                    sums[b, head, 0] += step * through_a
                    sums[b, head, 1] += through_D
                    for n in range(N):
                        dB[b, t, head, n] = vectors[i, 2 * N + n]
                        dC[b, t, head, n] = vectors[i, 3 * N + n]
                for p in range(P):
                    for n in range(N):
                        dstate[b, head, p, n] = rows[p, n]
        task = upto


@jit
def _backward_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _backward, arguments)


@jit
def _update(first, last, x, dt, A, B, C, D, state, y, width):
    """Tasks ``first .. last - 1``, each one (batch row, head); ``state`` is overwritten."""
    N, H = len(width), state.shape[1]
    share = H // B.shape[1]
    zero = x.dtype.type(0)
    for task in range(first, last):
        b, h = task // H, task % H
        group, step = h // share, dt[b, h]
        decay = exp(step * A[h])
        for p in range(x.shape[2]):
            inflow = step * x[b, h, p]
            total = zero
            for n in range(N):
                value = decay * state[b, h, p, n] + inflow * B[b, group, n]
                state[b, h, p, n] = value
                total += value * C[b, group, n]
            y[b, h, p] = total + D[h] * x[b, h, p]


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
    """`distill.ops.ssd.ssd` on CPU tensors that have been checked; shapes as there."""
    operands = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        y, state = _Scan.apply(x, dt, A, B, C, D, reset, initial_state)
        return y, state
    y, state, _ = _run_forward(x, dt, A, B, C, D, reset, initial_state, keep=False)
    return y, state


def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.ssd.ssd_update` on CPU tensors; shapes as there."""
    arrays = [array(tensor, state.dtype) for tensor in (x, dt, A, B, C, D, state)]
    y = np.empty_like(arrays[0])
    spread(_update_team, state.shape[0] * state.shape[1], state.numel(), *arrays, y, width_of(state.shape[3]))
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
        arrays = [array(tensor, dtype) for tensor in (x, dt, A, B, C, D)]
        x_, dt_, _, B_ = arrays[:4]
        batch, length, heads = dt_.shape
        groups, states = B_.shape[2:]
        dx, ddt = np.empty_like(x_), np.empty_like(dt_)
        dB, dC = (np.empty((batch, length, heads, states), x_.dtype) for _ in range(2))
        sums = np.zeros((batch, heads, 2))
        dstate = np.empty((batch, heads, x_.shape[3], states), x_.dtype)
        marks = _NO_RESET if reset is None else reset.contiguous().numpy()
        outputs = (dx, ddt, dB, dC, sums, dstate)
        inputs = (*arrays, marks, checkpoints.numpy(), array(dy, dtype))
        spread(_backward_team, batch * heads, x.numel() * states, *inputs, *outputs, CHECKPOINT_EVERY)
        if groups != heads:
            dB, dC = (grad.reshape(batch, length, groups, heads // groups, states).sum(axis=3) for grad in (dB, dC))
        # numpy adds the batch rows one after the other, whatever the thread count.
        dA, dD = sums.sum(axis=0).T
        grads = (dx, ddt, dA, dB, dC, dD, None, dstate)
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
    """Return y, the final state and, if ``keep``, the states ``[B, chunks, H, P, N]`` at chunk starts."""
    dtype = compute_dtype(x, dt, A, B, C, D)
    batch, length, heads, width = x.shape
    states = B.shape[3]
    y = torch.empty(x.shape, dtype=dtype, device="cpu")
    state = torch.zeros(batch, heads, width, states, dtype=dtype, device="cpu")
    if initial_state is not None:
        state.copy_(initial_state.detach())
    chunks = -(-length // CHECKPOINT_EVERY) if keep else 0
    checkpoints = torch.empty(batch, chunks, heads, width, states, dtype=dtype, device="cpu")
    arrays = [array(tensor, dtype) for tensor in (x, dt, A, B, C, D)]
    arrays.append(_NO_RESET if reset is None else reset.contiguous().numpy())
    arrays += [state.numpy(), y.numpy(), checkpoints.numpy()]
    spread(_forward_team, batch * heads, x.numel() * states, *arrays, width_of(states), CHECKPOINT_EVERY)
    return y.to(x.dtype), state, checkpoints
