"""Backends: one file each, which measures itself; `eval.throughput` asks the same little of all of them."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

from distill.errors import choose

NAMES = ("hf", "llama.cpp", "vllm")


class Engine(Protocol):
    """A model ready to be timed. Times are wall-clock seconds of the whole batch; the device has finished when a method
    returns. Memory that does not suffice raises what the library raises (`distill.errors.out_of_memory` knows it)."""

    name: str
    shape: Any
    """`eval.roofline.Shape`."""
    dtype: torch.dtype
    device: torch.device
    holds_cache: bool
    """Whether the cache is there to be measured, or its bytes are computed."""

    def prepare(self, batch: int, capacity: int) -> None:
        """Make room for ``capacity`` tokens of ``batch`` sequences; what was prepared before is let go first."""

    def step(self, context: int) -> float:
        """One decoding step that leaves ``context`` tokens (1 ... capacity) in the cache; contents are made up."""

    def generate(self, tokens: int) -> float:
        """1 token in, ``tokens`` out, from an empty cache."""

    def prefill(self, batch: int, tokens: int) -> float:
        """From prompts of ``tokens`` to the first token of each of ``batch``; needs no ``prepare``."""

    def cache_bytes(self, context: int) -> dict[str, int]:
        """``kv_bytes`` and ``state_bytes`` of the prepared batch at ``context``."""

    def overhead_bytes(self) -> int:
        """Most memory that a step needs beside weights and cache, measured on the prepared batch."""

    def release(self) -> None:
        """Let go of what ``prepare`` took; the model stays."""


def backend(name: str) -> Any:
    """The module of a backend; UserError for one that there is not (its packages are checked when it opens a model).

    Each has ``open_model(source, name, dtype, models=1, length=0) -> Engine``: ``source`` a model folder or hub name,
    ``models`` how many will be open together, ``length`` of the longest sequence (0: as the model says), and
    ``check_installed()``, which raises UserError where it cannot run here.
    """
    return importlib.import_module(f"{__name__}.{choose('backend', name, NAMES).replace('.', '_')}")
