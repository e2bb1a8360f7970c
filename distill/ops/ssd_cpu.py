"""State space duality on CPU: the scan in matrix products, the single-token update in one compiled pass.

B = batch, H = heads, P = channels a head, N = states a channel, G = groups of B and C
"""

# The kernel is typed by numba, when it is compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.ops.cpu import array, exp, jit, spread, width_of
from distill.ops.ssd_chunked import scan

__all__ = ["scan", "update"]


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


def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.ssd.ssd_update` on CPU tensors; shapes as there."""
    arrays = [array(tensor, state.dtype) for tensor in (x, dt, A, B, C, D, state)]
    y = np.empty_like(arrays[0])
    spread(_update, state.shape[0] * state.shape[1], state.numel(), *arrays, y, width_of(state.shape[3]))
    out = torch.from_numpy(y)
    return out if out.dtype == x.dtype else out.to(x.dtype)
