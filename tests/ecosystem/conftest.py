"""Hybrids and batches that every library is given, and no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize


@pytest.fixture(scope="session")
def make_hybrid(make_llama: Callable[..., Any]) -> Callable[..., Any]:
    """``make_hybrid(mixer, **keys)``: a new H1-2/4 of the tiny Llama, its first and last block ``mixer``."""

    def make(mixer: str, **keys: Any) -> Any:
        return hybridize(make_llama(**keys), [mixer, "attention", "attention", mixer], MixerConfig(), seed=0)

    return make


@pytest.fixture(params=["mamba1", "mamba2"])
def swapped(request: pytest.FixtureRequest, make_hybrid: Callable[..., Any]) -> Any:
    """An H1-2/4 of each mixer in turn."""
    return make_hybrid(request.param)


@pytest.fixture(scope="session")
def chain() -> torch.Tensor:
    """Token ids [4, 24] in which every token follows from the one before: quickly learnt."""
    return (torch.arange(24) * torch.tensor([[1], [2], [3], [5]]) % 40) + 10
