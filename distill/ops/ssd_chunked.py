"""State space duality in chunks of matrix products, in plain PyTorch: any device, differentiable by autograd.

Source: Mamba-2 (arXiv:2405.21060, section 6, listing 1): within a chunk the scan is a masked, decaying form of
attention; between chunks only the states at their ends are carried on. Documents go in as rows of their own: a mask of
products would let inf and NaN pass from one to another (see `distill.ops.split_rows`).

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C,
    K = chunks, Q = tokens a chunk
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.ops.selective_scan_reference import compute_dtype
from distill.ops.split_rows import by_document

CHUNK = 64
Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Decorate what computes in the dtype of its operands, also where autocast would take products in a half type."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(each for each in args if isinstance(each, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@full_precision
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`distill.ops.ssd.ssd` on tensors that have been checked; shapes as there. ``chunk``, the tokens a chunk, changes
    the last bits only."""
    dtype = compute_dtype(x, dt, A, B, C, D)
    y, state = by_document(partial(_scan, A, D, dtype, chunk), (x, dt, B, C), reset, initial_state)
    return y.to(x.dtype), state


def _scan(
    A: Tensor,
    D: Tensor,
    dtype: torch.dtype,
    chunk: int,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`scan` of rows without documents; y in ``dtype``."""
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    per_group = heads // groups
    chunk = min(chunk, length)
    short = -length % chunk
    skip = D.to(dtype)[:, None] * x.to(dtype)

    def chunks(tensor: Tensor, *trailing: int) -> Tensor:
        """``[B, T, ...]`` to ``[B, K, ..., Q, last]``, zeros after the last token."""
        tensor = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, short)) if short else tensor
        return tensor.reshape(batch, tensor.shape[1] // chunk, chunk, *trailing).movedim(2, -2)

    step = dt.to(dtype)
    u = chunks(x.to(dtype) * step[..., None], groups, per_group, width)  # [B, K, G, H/G, Q, P]
    b, c = chunks(B.to(dtype), groups, states), chunks(C.to(dtype), groups, states)  # [B, K, G, Q, N]
    # Sums of dt A in float64: differences of float32 sums would lose what a small step adds to a large sum.
    log = chunks(step.double() * A.double(), heads).movedim(-1, -2).unflatten(2, (groups, per_group))
    total = log.cumsum(-1)  # [B, K, G, H/G, Q]
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).to(dtype).exp()
    y = ((c @ b.mT)[:, :, :, None] * within) @ u  # [B, K, G, H/G, Q, P]

    to_end, from_start = (total[..., -1:] - total).to(dtype).exp(), total.to(dtype).exp()  # [B, K, G, H/G, Q]
    added = (u * to_end[..., None]).mT @ b[:, :, :, None]  # [B, K, G, H/G, P, N]
    kept = from_start[..., -1, None, None]  # [B, K, G, H/G, 1, 1]
    state = x.new_zeros(batch, groups, per_group, width, states, dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype).unflatten(1, (groups, per_group))
    before = []
    for keep, new in zip(kept.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = keep * state + new
    carried = c[:, :, :, None] @ torch.stack(before, 1).mT  # [B, K, G, H/G, Q, P]
    y = y + carried * from_start[..., None]
    y = y.movedim(-2, 2).reshape(batch, length + short, heads, width)[:, :length] + skip
    return y, state.flatten(1, 2).detach()


@full_precision
@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.ssd.ssd_update`; shapes as there."""
    dtype = state.dtype
    heads = state.shape[1]
    step = dt.to(dtype)
    u = x.to(dtype)
    b, c = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))
    state.mul_(torch.exp(step * A.to(dtype))[..., None, None])
    state.add_((u * step[..., None])[..., None] * b[:, :, None])
    y = (state @ c[..., None])[..., 0] + D.to(dtype)[:, None] * u
    return y.to(x.dtype)
