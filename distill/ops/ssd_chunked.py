"""State space duality in chunks of matrix products, in plain PyTorch: any device, differentiable by autograd.

Source: Mamba-2 (arXiv:2405.21060, section 6, listing 1): within a chunk the scan is a masked, decaying form of
attention; between chunks only the states at their ends are carried on.

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C,
    K = chunks, Q = tokens a chunk
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.ops.selective_scan_reference import compute_dtype

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
    dtype, out_dtype = compute_dtype(x, dt, A, B, C, D), x.dtype
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
    document = None if reset is None else chunks(reset[..., None].long(), 1)[..., 0].cumsum(-1)  # [B, K, Q]

    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if document is not None:  # only tokens of one's own document
        seen = seen & (document[..., :, None] == document[..., None, :])
        seen = seen[:, :, None, None]  # [B, K, 1, 1, Q, Q]
    # Summed from the start of each document: a sum across documents would let one change the last bits of the next.
    total = log.cumsum(-1) if document is None else (seen.double() @ log[..., None])[..., 0]  # [B, K, G, H/G, Q]
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).to(dtype).exp()
    y = ((c @ b.mT)[:, :, :, None] * within) @ u  # [B, K, G, H/G, Q, P]

    to_end, from_start = total[..., -1:] - total, total
    if document is not None:
        other = document[..., None, None, :]
        to_end = to_end.masked_fill(other != other[..., -1:], -torch.inf)
        from_start = from_start.masked_fill(other != 0, -torch.inf)
    to_end, from_start = to_end.to(dtype).exp(), from_start.to(dtype).exp()  # [B, K, G, H/G, Q]
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
    return y.to(out_dtype), state.flatten(1, 2).detach()


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
