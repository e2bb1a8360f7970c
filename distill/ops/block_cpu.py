"""One token from a mixer to the next on CPU, in one compiled pass: the residual, the norm behind it, the gated MLP, its
residual, the next norm and the next mixer's input projection.

Decoding a small model spends its time around the work: some twenty PyTorch calls a block become one, and a batch's rows
are shared among threads from the first to the last of them. Float32 only.

    B = batch, E = hidden size, I = intermediate size
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.ops.cpu import array, exp, jit, spread
from distill.ops.openmp import parallel

ROWS = 16  # at a time: their inner activations stay in the first-level cache or near it


@jit
def _row(flat, start, row, rows, width):
    """Row ``row`` of so many, or the last of them; flat slices are what the compiler turns into vectors."""
    at = start + min(row, rows - 1) * width
    return flat[at : at + width]


@jit
def _product(inputs, rows, width, weight, outs, out):
    """out[b, n] = sum over k of inputs[b, k] weight[n, k], flat; sixteen sums at a time, or a core waits for each."""
    zero = out.dtype.type(0)
    for n in range(0, outs, 4):
        w0, w1 = _row(weight, 0, n, outs, width), _row(weight, 0, n + 1, outs, width)
        w2, w3 = _row(weight, 0, n + 2, outs, width), _row(weight, 0, n + 3, outs, width)
        n1, n2, n3 = min(n + 1, outs - 1), min(n + 2, outs - 1), min(n + 3, outs - 1)
        for b in range(0, rows, 4):
            x0, x1 = _row(inputs, 0, b, rows, width), _row(inputs, 0, b + 1, rows, width)
            x2, x3 = _row(inputs, 0, b + 2, rows, width), _row(inputs, 0, b + 3, rows, width)
            s00, s01, s02, s03 = zero, zero, zero, zero
            s10, s11, s12, s13 = zero, zero, zero, zero
            s20, s21, s22, s23 = zero, zero, zero, zero
            s30, s31, s32, s33 = zero, zero, zero, zero
            for k in range(width):
                p0, p1, p2, p3 = x0[k], x1[k], x2[k], x3[k]
                q0, q1, q2, q3 = w0[k], w1[k], w2[k], w3[k]
                s00 += p0 * q0
                s01 += p0 * q1
                s02 += p0 * q2
                s03 += p0 * q3
                s10 += p1 * q0
                s11 += p1 * q1
                s12 += p1 * q2
                s13 += p1 * q3
                s20 += p2 * q0
                s21 += p2 * q1
                s22 += p2 * q2
                s23 += p2 * q3
                s30 += p3 * q0
                s31 += p3 * q1
                s32 += p3 * q2
                s33 += p3 * q3
            b0, b1 = b * outs, min(b + 1, rows - 1) * outs
            b2, b3 = min(b + 2, rows - 1) * outs, min(b + 3, rows - 1) * outs
            out[b0 + n], out[b0 + n1], out[b0 + n2], out[b0 + n3] = s00, s01, s02, s03
            out[b1 + n], out[b1 + n1], out[b1 + n2], out[b1 + n3] = s10, s11, s12, s13
            out[b2 + n], out[b2 + n1], out[b2 + n2], out[b2 + n3] = s20, s21, s22, s23
            out[b3 + n], out[b3 + n1], out[b3 + n2], out[b3 + n3] = s30, s31, s32, s33


@jit
def _norm(rows, at, width, weight, eps, out, to):
    """RMSNorm of ``rows[at : at + width]`` into ``out`` from ``to`` on."""
    one, square = rows.dtype.type(1), rows.dtype.type(0)
    row, into = rows[at : at + width], out[to : to + width]
    for k in range(width):
        square += row[k] * row[k]
    scale = one / math.sqrt(square / rows.dtype.type(width) + eps)
    for k in range(width):
        into[k] = weight[k] * (row[k] * scale)


@jit
def _rest(first, last, hidden, mixed, norm, eps, gate, up, down, following, following_eps, after, widths, out, carry):
    """Rows ``first .. last - 1``; all flat, ``after`` possibly empty. widths: of a row of hidden, the MLP within and
    carry. ``out`` may be ``hidden`` itself."""
    width, inner, carried = widths
    one = hidden.dtype.type(1)
    some = min(ROWS, last - first)
    into = np.empty(some * width, hidden.dtype)
    gates, ups = np.empty(some * inner, hidden.dtype), np.empty(some * inner, hidden.dtype)
    for begin in range(first, last, ROWS):
        rows, at = min(ROWS, last - begin), begin * width
        for k in range(at, at + rows * width):
            out[k] = hidden[k] + mixed[k]
        for b in range(rows):
            _norm(out, at + b * width, width, norm, eps, into, b * width)
        _product(into, rows, width, gate, inner, gates)
        _product(into, rows, width, up, inner, ups)
        for k in range(rows * inner):
            gates[k] = gates[k] / (one + exp(-gates[k])) * ups[k]
        _product(gates, rows, inner, down, width, into)
        for k in range(rows * width):
            out[at + k] += into[k]
        if len(after) > 0:
            for b in range(rows):
                _norm(out, at + b * width, width, following, following_eps, into, b * width)
            _product(into, rows, width, after, carried, carry[begin * carried :])
        else:
            for b in range(rows):
                _norm(out, at + b * width, width, following, following_eps, carry, at + b * width)


@jit
def _rest_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _rest, arguments)


_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def rest(
    hidden: Tensor,
    mixed: Tensor,
    norm: tuple[Tensor, float],
    mlp: tuple[Tensor, Tensor, Tensor],
    following: tuple[Tensor, float],
    after: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out = h + down(SiLU(gate n) * up n)`` with ``h = hidden + mixed`` and n its norm, ``[B, E]``, and what the next
    mixer starts from: ``after`` times the next norm of ``out``, ``[B, S]``, or that norm itself.

    Args:
        hidden, mixed: ``[B, E]``, what a block was given and what its mixer made of it. norm, following: RMSNorm's
            weight ``[E]`` and eps.
        mlp: weights of gate and up ``[I, E]`` and of down ``[E, I]``.
        after: ``[S, E]``, the next mixer's input projection, or None.
    """
    rows, width = hidden.shape
    inner = mlp[0].shape[0]
    carried = width if after is None else after.shape[0]
    head = [_flat(t) for t in (hidden, mixed, norm[0])]
    tail = [_flat(_NOTHING if after is None else after), (width, inner, carried)]
    out = torch.empty(rows, width, dtype=torch.float32, device="cpu")
    carry = torch.empty(rows, carried, dtype=torch.float32, device="cpu")
    spread(
        _rest_team, rows, rows * width * inner // 8,
        *head, np.float32(norm[1]), *[_flat(weight) for weight in mlp], _flat(following[0]), np.float32(following[1]),
        *tail, out.numpy().reshape(-1), carry.numpy().reshape(-1),
    )  # fmt: skip
    return out, carry


def _flat(tensor: Tensor) -> Any:
    return array(tensor, torch.float32).reshape(-1)
