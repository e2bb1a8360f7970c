"""The transformers backend: our own decode loop.

On CPU a step reads a preallocated cache where it lies, with compiled attention; on a GPU the whole step is a CUDA
graph, captured once for a batch and a capacity and replayed at every context.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from distill.hybrid import decoding
from distill.machine import free_memory
from distill.teacher import load_model
from eval.backends.attention import Filled, configs_of, in_place_attention
from eval.backends.caches import InPlaceLayer, cache_bytes, fill, fixed_cache, in_place_cache, move
from eval.backends.peak import peak_of
from eval.machine import synchronize
from eval.roofline import Shape

__all__ = ["Decoder", "GraphDecoder", "InPlaceLayer", "Model", "in_place_cache", "open_model"]


class Decoder:
    """Greedy decoding, a token at a time for a batch, from a cache filled with synthetic states.

    Args:
        batch: sequences B. context: tokens in the cache after a step, at least 1. spare: tokens that can follow.
    """

    def __init__(self, model: Any, batch: int, context: int, spare: int = 1) -> None:
        self.model, self.configs = model.eval(), configs_of(model)
        self.capacity, self.context = context + spare, context
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.start()
        if context > 1:
            fill(self.cache)
            self.move_to(context - 1)

    def start(self) -> None:
        """Make the cache and take the first step, which gives it its buffers."""
        self.cache = in_place_cache(self.model, self.capacity)
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """One token for every sequence."""
        with in_place_attention(self.configs):
            logits = decoding.step(self.model, self.tokens, self.cache, None, None)
            if logits is None:
                inputs = {"input_ids": self.tokens, "past_key_values": self.cache, "use_cache": True}
                logits = self.model(**inputs, logits_to_keep=1).logits
        self.tokens = logits[:, -1:].argmax(-1)

    def move_to(self, filled: int) -> None:
        """Say that ``filled`` tokens are in the cache."""
        move(self.cache, filled)

    def timed_step(self, context: int | None = None) -> float:
        """Seconds of one step that leaves ``context`` tokens (by default the one given first), as often as asked."""
        self.move_to((context or self.context) - 1)
        synchronize(self.model.device)
        began = time.perf_counter()
        self.step()
        synchronize(self.model.device)
        return time.perf_counter() - began

    def generate(self, tokens: int) -> float:
        """Seconds of ``tokens`` steps from an empty cache (states go on from what they are: speed does not ask)."""
        self.move_to(0)
        synchronize(self.model.device)
        began = time.perf_counter()
        for _ in range(tokens):
            self.step()
        synchronize(self.model.device)
        return time.perf_counter() - began

    def cache_bytes(self) -> dict[str, int]:
        """Bytes that the cache of the whole batch holds at this context: ``kv_bytes``, the keys and values filled,
        and ``state_bytes``, the states of convolutions and scans."""
        return cache_bytes(self.cache, self.context)


class GraphDecoder(Decoder):
    """The same with nothing in a step that depends on the host: every buffer and state stays where it is, the position
    and the tokens are tensors that the step itself moves on. On a GPU it is captured as one CUDA graph and replayed; on
    CPU, for tests, it runs as it is."""

    graph: torch.cuda.CUDAGraph | None = None

    def start(self) -> None:
        device, batch = self.model.device, len(self.tokens)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.filled = Filled.of(batch, self.capacity, device)
        self.cache = fixed_cache(self.model, self.capacity, self.position)
        self.advance()
        if device.type == "cuda":
            self.capture()
        self.move_to(1)

    def capture(self) -> None:
        """Capture the step, after warm-up steps on a stream of their own (libraries allocate in their first calls)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.move_to(0)
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.move_to(0)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """The step, on the device alone."""
        with in_place_attention(self.configs):
            output = self.model(
                input_ids=self.tokens,
                position_ids=self.position[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                filled=self.filled,
            )
        self.tokens.copy_(output.logits[:, -1:].argmax(-1))
        self.position.add_(1)
        self.filled.tokens.add_(1)

    def step(self) -> None:
        """One token for every sequence."""
        if self.reached >= self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {self.reached + 1} were given")
        if self.graph is None:
            self.advance()
        else:
            self.graph.replay()
        self.reached += 1

    def move_to(self, filled: int) -> None:
        super().move_to(filled)
        self.reached = filled  # on the host, which no kernel asks
        self.position.fill_(filled)
        self.filled.tokens.fill_(filled + 1)


class Model:
    """A loaded model as an `eval.backends.Engine`."""

    holds_cache = True

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, self.shape, self.configs = name, model, Shape.of(model), configs_of(model)
        self.dtype, self.device = model.dtype, model.device
        self.decoder: Decoder | None = None

    @property
    def prepared(self) -> Decoder:
        assert self.decoder is not None, "prepare comes first"
        return self.decoder

    def prepare(self, batch: int, capacity: int) -> None:
        self.release()
        wanted = self.shape.kv_bytes(batch, capacity) + self.shape.state_bytes(batch)
        free = free_memory(self.model.device)
        if wanted > free:
            raise MemoryError(f"a cache of {wanted / 1e9:,.3g} GB, and {free / 1e9:,.3g} GB are free")
        kind = GraphDecoder if self.model.device.type == "cuda" else Decoder
        self.decoder = kind(self.model, batch, capacity, spare=0)

    def step(self, context: int) -> float:
        return self.prepared.timed_step(context)

    def generate(self, tokens: int) -> float:
        return self.prepared.generate(tokens)

    @torch.no_grad()
    def prefill(self, batch: int, tokens: int) -> float:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=self.model.device)
        cache = in_place_cache(self.model, tokens)
        synchronize(self.model.device)
        began = time.perf_counter()
        with in_place_attention(self.configs):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        output.logits[:, -1:].argmax(-1)
        synchronize(self.model.device)
        return time.perf_counter() - began

    def cache_bytes(self, context: int) -> dict[str, int]:
        return cache_bytes(self.prepared.cache, context)

    def overhead_bytes(self) -> int:
        """Of the step as the host runs it: what a graph needs is what its capture took."""
        decoder = self.prepared
        decoder.move_to(decoder.capacity - 1)
        return peak_of(decoder.advance if isinstance(decoder, GraphDecoder) else decoder.step, self.model.device)

    def release(self) -> None:
        self.decoder = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def check_installed() -> None:
    """Nothing is needed beyond what we depend on."""


def open_model(source: str, name: str, dtype: str, *, models: int = 1, length: int = 0) -> Model:
    """The model in a folder or on a hub, ready to be timed; UserError where there is none. (How many models there are,
    and how long the sequences will be, matters to others.)"""
    return Model(name, load_model(source, dtype))
