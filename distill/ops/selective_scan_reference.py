"""The selective scan as the papers write it: one plain PyTorch step a token, differentiable by autograd.

Slow, obvious, any device and dtype; in float64 it is the oracle that the fast kernels are tested against.
Mamba (arXiv:2312.00752, eq. 2) with the M1 grouping of Apriel-H1 (eq. 1-2): G groups of D/G channels each
share one B and one C vector.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


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
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, ``y_t = C_t . h_t + D x_t``; as in `selective_scan`.

    Returns y ``[B, T, D]`` in x's dtype and the detached final state ``[B, D, N]``.
    """
    dtype = compute_dtype(x, dt, A, B, C, D)
    batch, _, channels = x.shape
    out_dtype = x.dtype
    x, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    groups, states = B.shape[2:]
    spread = (batch, groups, channels // groups, states)
    state = x.new_zeros(batch, channels, states) if initial_state is None else initial_state.to(dtype)
    outputs = []
    # unbind and not x[:, t]: the backward of T slices fills T tensors of the full length.
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)):
        if reset is not None:
            # A select and not a product: an infinite state must not survive as 0 * inf = NaN.
            state = torch.where(reset[:, t, None, None], torch.zeros_like(state), state)
        # expand and not repeat_interleave, which wakes all threads however small the tensor; to [B, D, N].
        B_t, C_t = (group[:, :, None].expand(spread).flatten(1, 2) for group in (B_t, C_t))
        state = torch.exp(dt_t[..., None] * A) * state + (dt_t * x_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1) + D * x_t)
    return torch.stack(outputs, dim=1).to(out_dtype), state.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """One step of `scan` that overwrites ``state [B, D, N]``; shapes as in `selective_scan_update`."""
    y, new_state = scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, initial_state=state)
    state.copy_(new_state)
    return y[:, 0]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a scan runs in: float64 if any of ``tensors`` is, else float32 (half types are upcast)."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds the values of all ``tensors``: the kernels of packages take one for several operands."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
