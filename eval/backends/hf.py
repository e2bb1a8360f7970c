"""The transformers backend: a decode loop with a preallocated in-place cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values [B, kv_heads, capacity, head_dim] preallocated and written in place; attention sees a view of
    what is filled. (StaticLayer attends over its whole capacity, DynamicLayer copies everything each step: either
    would make the teacher slower than it is served.)"""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values [B, kv_heads, t, head_dim] and return views of all so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[-1])
            self.key_buffer, self.value_buffer = key_states.new_zeros(shape), value_states.new_zeros(shape)
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


def in_place_cache(model: Any, capacity: int) -> Cache:
    """A cache for ``model``: in-place keys and values where a block has attention, fixed states elsewhere."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return Cache(layers=[InPlaceLayer(capacity) if t == "full_attention" else LinearAttentionLayer() for t in types])


class Decoder:
    """Greedy decoding, a token at a time for a batch, from a cache filled with synthetic states.

    Args:
        batch: sequences B. context: tokens in the cache after a step, at least 1. spare: tokens that can follow.
    """

    def __init__(self, model: Any, batch: int, context: int, spare: int = 1) -> None:
        self.model = model.eval()
        self.cache = in_place_cache(model, context + spare)
        self.context = context
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.step()
        if context > 1:
            self._fill(context - 1)

    @torch.no_grad()
    def _fill(self, filled: int) -> None:
        """Synthetic contents: speed does not depend on values, as long as they are ordinary numbers."""
        generator = torch.Generator(self.model.device).manual_seed(0)
        for layer in self.cache.layers:
            if isinstance(layer, InPlaceLayer):
                for buffer in (layer.key_buffer, layer.value_buffer):
                    buffer.normal_(generator=generator)
                layer.move_to(filled)

    @torch.no_grad()
    def step(self) -> None:
        """One token for every sequence."""
        output = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = output.logits[:, -1:].argmax(-1)

    def timed_step(self) -> float:
        """Seconds of one step at the context given; the context is the same at each call."""
        for layer in self.cache.layers:
            if isinstance(layer, InPlaceLayer):
                layer.move_to(self.context - 1)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def cache_bytes(self) -> dict[str, int]:
        """Bytes that the cache of the whole batch holds at this context: ``kv_bytes``, the keys and values filled,
        and ``state_bytes``, the states of convolutions and scans."""
        total = {"kv_bytes": 0, "state_bytes": 0}
        for layer in self.cache.layers:
            if isinstance(layer, InPlaceLayer):
                kind, tensors = "kv_bytes", [layer.keys, layer.values]
            else:
                kind, tensors = "state_bytes", [*layer.conv_states.values(), *layer.recurrent_states.values()]
            total[kind] += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return total
