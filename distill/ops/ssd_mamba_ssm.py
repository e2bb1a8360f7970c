"""State space duality by mamba-ssm's Triton kernels (Mamba-2, arXiv:2405.21060; written against 2.3.2.post1).

Documents go in as rows of their own (see `distill.ops.split_rows`): the kernels know ``seq_idx``, but add decays up
along a chunk whatever documents it holds, and leave others out by a product with 0, which inf and NaN pass.

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C
"""

from __future__ import annotations

from functools import partial

import torch
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from distill.ops import ssd_chunked as chunked
from distill.ops.selective_scan_reference import compute_dtype, widest
from distill.ops.split_rows import by_document

CHUNK, LEAST_CHUNK = 256, 16  # tokens; a chunk takes the memory of its square even where a row is shorter


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
    """`distill.ops.ssd.ssd` on tensors that have been checked; shapes as there.

    x, B and C go in as the widest of their types; dt, A, D and the states are float32. float64 runs in
    `distill.ops.ssd_chunked`.
    """
    if compute_dtype(x, dt, A, B, C, D) == torch.float64:
        return chunked.scan(x, dt, A, B, C, D, reset, initial_state)
    return by_document(partial(_scan, A.float(), D.float()), (x, dt, B, C), reset, initial_state)


def _scan(
    A: Tensor, D: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`scan` of rows without documents."""
    dtype = widest(x, B, C)
    y, state = mamba_chunk_scan_combined(
        x.to(dtype),
        dt.float(),
        A,
        B.to(dtype),
        C.to(dtype),
        min(CHUNK, max(LEAST_CHUNK, 1 << (x.shape[1] - 1).bit_length())),
        D=D,
        initial_states=None if initial_state is None else initial_state.float(),
        return_final_states=True,
    )
    return y.to(x.dtype), state.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.ssd.ssd_update`; shapes as there."""
    if state.dtype == torch.float64:
        return chunked.update(state, x, dt, A, B, C, D)
    A, D = A[:, None, None].expand(state.shape[1:]), D[:, None].expand(x.shape[1:])
    return update_heads(state, x, dt[..., None].expand(x.shape), A, B, C, D)


def update_heads(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """One token: overwrites ``state [B, H, P, N]`` and returns y like ``x [B, H, P]``; dt ``[B, H, P]``, A
    ``[H, P, N]``, B and C ``[B, G, N]``, D ``[H, P]``. Strides of 0 tell the kernel what a head shares."""
    # The package asks for the strides of D and dt_bias even where they are None, and fails.
    no_bias = D.new_zeros(1).expand(D.shape)
    y: Tensor = selective_state_update(state, x, dt, A, B, C, D, dt_bias=no_bias)
    return y
