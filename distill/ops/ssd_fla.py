"""State space duality by flash-linear-attention's Triton kernels (written against fla-core 0.6.0).

Its simple GLA is the same recurrence in the words of attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t with
q = C, k = B, v = dt x, g = dt A and scale 1; the skip D x is added here. Documents are sequences of their own
(``cu_seqlens``), whose chunks hold no other's tokens: nothing of one reaches another. Where documents begin has to be
known on the CPU: a wait for the GPU, once for a ``reset`` that many layers are given.

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C
"""

from __future__ import annotations

import torch
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
from torch import Tensor

from distill.ops import ssd_chunked as chunked
from distill.ops.selective_scan_reference import compute_dtype, widest
from distill.ops.split_rows import documents


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

    x, B and C go in as the widest of their types, or as float32 where P or N is odd, which the backward of half types
    does not take; decays and states are float32. float64 runs in the chunked form.
    """
    if compute_dtype(x, dt, A, B, C, D) == torch.float64:
        return chunked.scan(x, dt, A, B, C, D, reset, initial_state)
    dtype = widest(x, B, C) if x.shape[3] % 2 == B.shape[3] % 2 == 0 else torch.float32
    v, g = (x * dt[..., None]).to(dtype), dt.float() * A.float()
    q, k = (spread(tensor, x.shape[2]).to(dtype) for tensor in (C, B))
    state = None if initial_state is None else initial_state.float()
    if reset is None:
        o, final = chunk_simple_gla(
            q, k, v, g, scale=1.0, initial_state=state, output_final_state=True, state_v_first=True
        )
    else:
        rows = documents(reset)
        if state is not None:
            kept = state.masked_fill(reset[:, 0, None, None, None], 0)
            state = state.new_zeros(len(rows.edges) - 1, *state.shape[1:]).index_copy(0, rows.first.to(x.device), kept)
        o, final = chunk_simple_gla(
            *(tensor.flatten(0, 1)[None] for tensor in (q, k, v, g)),
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            state_v_first=True,
            cu_seqlens=rows.edges.to(x.device),
            cu_seqlens_cpu=rows.edges,
        )
        o, final = o[0].unflatten(0, x.shape[:2]), final[rows.last.to(x.device)]
    return (o + D[:, None] * x).to(x.dtype), final.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`distill.ops.ssd.ssd_update`; shapes as there."""
    if state.dtype == torch.float64:
        return chunked.update(state, x, dt, A, B, C, D)
    v, g = x.float() * dt[..., None].float(), dt.float() * A.float()
    q, k = (spread(tensor[:, None], x.shape[1]).float() for tensor in (C, B))
    o, final = fused_recurrent_simple_gla(
        q, k, v[:, None], g[:, None], scale=1.0, initial_state=state, output_final_state=True, state_v_first=True
    )
    state.copy_(final)
    return (o[:, 0] + D[:, None] * x).to(x.dtype)


def spread(groups: Tensor, heads: int) -> Tensor:
    """``[B, T, G, N]`` to ``[B, T, H, N]``: the kernels give every head its own q and k."""
    return groups if groups.shape[2] == heads else groups.repeat_interleave(heads // groups.shape[2], dim=2)
