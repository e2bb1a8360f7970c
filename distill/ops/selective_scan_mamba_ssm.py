"""The selective scan and its step by mamba-ssm's CUDA kernels (Mamba, arXiv:2312.00752; written against 2.3.2.post1).

``selective_scan_fn`` knows neither documents nor a state to start from. Documents go in as rows of their own (see
`distill.ops.split_rows`). A state h comes in on N tokens put before the first: token n has B = e_n, a step EPSILON so
small that nothing decays, and the input h[:, n] / EPSILON. Their outputs are cut off. EPSILON is a power of two:
dividing by it loses nothing.

The kernel wants ``[B, D, T]`` with neighbouring tokens side by side. A ``[B, T, D]`` view of such memory is taken as
it is; any other is copied by the package.

    B = batch, T = tokens, D = channels, N = states a channel, G = groups of B and C
"""

from __future__ import annotations

from functools import partial

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor
from torch.nn.functional import pad

from distill.ops import selective_scan_reference as reference
from distill.ops.split_rows import by_document
from distill.ops.ssd_mamba_ssm import update_heads

EPSILON = 2.0**-40  # exp(EPSILON A) is 1 for any A above -2^15, and h / EPSILON stays far from overflow
MOST_STATES = 256  # of selective_scan_fn


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
    """`distill.ops.selective_scan.selective_scan` on tensors that have been checked; shapes as there.

    x, dt, B and C go in as the widest of their types, since the kernel takes one for all, and as float32 with an
    initial state, which would be rounded otherwise. float64 and more than 256 states run in the reference.
    """
    if A.shape[1] > MOST_STATES or reference.compute_dtype(x, dt, A, B, C, D) == torch.float64:
        return reference.scan(x, dt, A, B, C, D, reset, initial_state)
    return by_document(partial(_scan, A.float(), D.float()), (x, dt, B, C), reset, initial_state)


def _scan(
    A: Tensor, D: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`scan` of rows without documents."""
    states = A.shape[1]
    dtype = reference.widest(x, dt, B, C) if initial_state is None else torch.float32
    u, dt, B, C = (tensor.to(dtype) for tensor in (x, dt, B, C))
    if initial_state is not None:
        u = torch.cat([initial_state.to(dtype).transpose(1, 2) / EPSILON, u], dim=1)
        unit = torch.eye(states, dtype=dtype, device=x.device)[None, :, None].expand(len(x), -1, B.shape[2], -1)
        dt = pad(dt, (0, 0, states, 0), value=EPSILON)
        B, C = torch.cat([unit, B], dim=1), pad(C, (0, 0, 0, 0, states, 0))
    y, last_state = selective_scan_fn(
        u.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D if initial_state is None else None,
        return_last_state=True,
    )
    y = y.transpose(1, 2)
    if initial_state is not None:
        y = y[:, states:] + D * x
    return y.to(x.dtype), last_state.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.selective_scan.selective_scan_update`; shapes as there. A group is what the kernel calls a head."""
    if state.dtype == torch.float64:
        return reference.update(state, x, dt, A, B, C, D)
    heads = (B.shape[1], x.shape[1] // B.shape[1])
    x, dt, A, D = x.unflatten(1, heads), dt.unflatten(1, heads), A.unflatten(0, heads), D.unflatten(0, heads)
    return update_heads(state.unflatten(1, heads), x, dt, A, B, C, D).flatten(1)
