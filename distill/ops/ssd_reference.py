"""State space duality as a recurrence: one plain PyTorch step a token, differentiable by autograd.

Slow, obvious, any device and dtype; in float64 it is the oracle of `distill.ops.ssd`.
Mamba-2 (arXiv:2405.21060, equation 1 with a scalar A_t I, and G groups of B and C as in section 7.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.ops.selective_scan_reference import compute_dtype


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
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``; as in `distill.ops.ssd.ssd`.

    Returns y ``[B, T, H, P]`` in x's dtype and the detached final state ``[B, H, P, N]``.
    """
    dtype, out_dtype = compute_dtype(x, dt, A, B, C, D), x.dtype
    x, dt, A, B, C, D = (tensor.to(dtype) for tensor in (x, dt, A, B, C, D))
    batch, _, heads, width = x.shape
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], torch.zeros_like(state), state)
        state = torch.exp(dt_t * A)[..., None, None] * state + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        outputs.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x_t)
    return torch.stack(outputs, dim=1).to(out_dtype), state.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """One step of `scan` that overwrites ``state [B, H, P, N]``; shapes as in `distill.ops.ssd.ssd_update`."""
    y, new_state = scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, initial_state=state)
    state.copy_(new_state)
    return y[:, 0]
