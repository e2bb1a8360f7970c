"""Caches that are written in place: preallocated, never moved, never copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values [B, kv_heads, capacity, head_dim] preallocated and written in place; attention sees a view of
    what is filled. (StaticLayer attends over its whole capacity, DynamicLayer copies everything each step: either
    would make the teacher slower than it is served.)"""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, kv_heads, t, head_dim] and return views of all so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[-1])
            self.key_buffer, self.value_buffer = (
                key_states.new_empty(shape).zero_(),
                value_states.new_empty(shape).zero_(),
            )
            self.is_initialized = True
        end = self.filled + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were given")
        self.key_buffer[:, :, self.filled : end] = key_states
        self.value_buffer[:, :, self.filled : end] = value_states
        self.move_to(end)
        return self.keys, self.values

    def move_to(self, filled: int) -> None:
        """Say how many tokens are filled (also back, to time the same step again)."""
        self.filled = filled
        self.keys, self.values = self.key_buffer[:, :, :filled], self.value_buffer[:, :, :filled]


class FixedLayer(DynamicLayer):
    """Keys and values of one token a step at a place that only the device knows, so that a CUDA graph of the step
    serves every context: buffers [B, capacity, kv_heads, head_dim], of which attention is given all, and reads what is
    filled (``Filled``)."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, capacity: int, position: Tensor) -> None:
        super().__init__()
        self.capacity, self.position, self.filled = capacity, position, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, kv_heads, 1, head_dim]; returns all of the buffers, heads first."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            batch, heads, _, width = key_states.shape
            shape = (batch, self.capacity, heads, width)
            self.key_buffer, self.value_buffer = (
                key_states.new_empty(shape).zero_(),
                value_states.new_empty(shape).zero_(),
            )
            self.keys, self.values = self.key_buffer.transpose(1, 2), self.value_buffer.transpose(1, 2)
            self.is_initialized = True
        self.key_buffer.index_copy_(1, self.position, key_states.transpose(1, 2))
        self.value_buffer.index_copy_(1, self.position, value_states.transpose(1, 2))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens filled, as the host counts them (a graph that is replayed does not run this code)."""
        return self.filled

    def move_to(self, filled: int) -> None:
        """Say how many tokens are filled; ``position`` is moved by who owns it."""
        self.filled = filled


def layer_types(model: Any) -> list[str]:
    """transformers' name for what each block caches."""
    config = model.config
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def in_place_cache(model: Any, capacity: int) -> Cache:
    """A cache for ``model``: in-place keys and values where a block has attention, fixed states elsewhere."""
    types = layer_types(model)
    return Cache(layers=[InPlaceLayer(capacity) if t == "full_attention" else LinearAttentionLayer() for t in types])


def fixed_cache(model: Any, capacity: int, position: Tensor) -> Cache:
    """The same with keys and values written at ``position`` [1], a tensor on the device that all blocks share."""
    types = layer_types(model)
    layers = [FixedLayer(capacity, position) if t == "full_attention" else LinearAttentionLayer() for t in types]
    return Cache(layers=layers)


def buffers(layer: Any) -> tuple[str, list[Tensor]]:
    """(``kv_bytes`` or ``state_bytes``, the tensors that a layer of a cache holds)."""
    if isinstance(layer, (InPlaceLayer, FixedLayer)):
        return "kv_bytes", [layer.key_buffer, layer.value_buffer]
    held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return "state_bytes", [tensor for tensor in held if tensor is not None]


@torch.no_grad()
def fill(cache: Cache) -> None:
    """Synthetic keys and values throughout: speed does not depend on values, as long as they are ordinary numbers."""
    for layer in cache.layers:
        kind, held = buffers(layer)
        for buffer in held if kind == "kv_bytes" else []:
            generator = None if buffer.is_meta else torch.Generator(buffer.device).manual_seed(0)
            buffer.copy_(torch.empty_like(buffer[:1]).normal_(generator=generator))


def move(cache: Cache, filled: int) -> None:
    """Say of every layer how many tokens are filled."""
    for layer in cache.layers:
        if isinstance(layer, (InPlaceLayer, FixedLayer)):
            layer.move_to(filled)


def cache_bytes(cache: Cache, context: int) -> dict[str, int]:
    """Bytes that the cache of the whole batch holds at ``context``: ``kv_bytes``, the keys and values filled, and
    ``state_bytes``, the states of convolutions and scans."""
    total = {"kv_bytes": 0, "state_bytes": 0}
    for layer in cache.layers:
        kind, held = buffers(layer)
        for tensor in held:
            share = (context, layer.capacity) if kind == "kv_bytes" else (1, 1)
            total[kind] += tensor.nbytes // share[1] * share[0]
    return total
