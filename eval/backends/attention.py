"""Attention of a decoding step over caches that lie in place, under transformers' own interface.

Grouped keys and values are never expanded: the query heads of a group read them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.ops.kernels import has_numba

IN_PLACE = "distill_in_place"


class Filled(NamedTuple):
    """How much of buffers [B, capacity, ...] counts, as tensors on the device: no host needs to know."""

    tokens: Tensor
    """[B] int32, after the step's own token."""
    query_starts: Tensor
    """[B + 1] int32: 0, 1, ... B."""
    key_starts: Tensor
    """[B + 1] int32: 0, capacity, ... B * capacity."""

    @classmethod
    def of(cls, batch: int, capacity: int, device: torch.device) -> Filled:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return cls(torch.ones(batch, dtype=torch.int32, device=device), starts, starts * capacity)


def attend_filled(query: Tensor, keys: Tensor, values: Tensor, scale: float | None, filled: Filled) -> Tensor:
    """Attention [B, H, 1, P] of a query of that shape over the filled part of buffers [B, capacity, KV, P], given as
    [B, KV, capacity, P]. The launch is the same whatever is filled, so that a CUDA graph can hold it."""
    batch, heads, _, width = query.shape
    kv_heads, capacity = keys.shape[1:3]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query.squeeze(2),
            keys.transpose(1, 2).flatten(0, 1),
            values.transpose(1, 2).flatten(0, 1),
            filled.query_starts,
            filled.key_starts,
            1,
            capacity,
            scale=scale,
            enable_gqa=heads != kv_heads,
            seqused_k=filled.tokens,
        )
        assert isinstance(out, Tensor)
        return out.unsqueeze(2)
    mask = torch.arange(capacity, device=query.device) < filled.tokens[:, None]  # [B, capacity]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, None, None], scale=scale)
    return attended.reshape(batch, heads, 1, width)


def attend_in_place(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    filled: Filled | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, t, P] -> ([B, t, H, P], None). One token takes the paths above; a prompt
    begins at an empty cache, and takes transformers' own."""
    if query.shape[2] == 1 and attention_mask is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if filled is not None:
            return attend_filled(query, key, value, scale, filled).transpose(1, 2), None
        if query.device.type == "cpu" and query.dtype == torch.float32 and has_numba():
            from eval.backends import attention_cpu

            return attention_cpu.attend(query, key, value, scale).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(IN_PLACE, attend_in_place)


def configs_of(model: Any) -> list[Any]:
    """Every config that a module of ``model`` holds: that of blocks shared with another model is that model's."""
    return list({id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values())


@contextmanager
def in_place_attention(configs: list[Any]) -> Iterator[None]:
    """The model of these configs attends as above inside, and as before afterwards."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = IN_PLACE
    try:
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config._attn_implementation = was
