"""Tiny random models for every test: 4 blocks, hidden 48, 4 query and 2 KV heads of 32 (so heads * 32 != hidden)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from distill.config import MixerConfig
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.data.traces import EmbeddedTraces
from distill.hybrid.surgery import hybridize

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # large enough that what a token sees shows in the logits
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 4,
}
MIXERS = ["mamba1", "attention", "attention", "mamba1"]


def _random(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    """``make_llama(**keys)``: a random Llama (tied embeddings) whose config differs by ``keys``."""
    return lambda **keys: _random(
        lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **keys}))
    )


@pytest.fixture
def llama(make_llama: Callable[..., Any]) -> Any:
    """A tiny Llama with tied embeddings."""
    return make_llama()


@pytest.fixture
def mistral() -> Any:
    """A tiny Mistral without a sliding window, embeddings not tied."""
    keys = {**SHAPE, "tie_word_embeddings": False, "sliding_window": None}
    return _random(lambda: MistralForCausalLM(MistralConfig(**keys)))


@pytest.fixture(params=["llama", "mistral"])
def family(request: pytest.FixtureRequest) -> Any:
    """Both families in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def hybrid(llama: Any) -> Any:
    """H1-2/4 of the Llama: the first and the last block have mamba1."""
    return hybridize(llama, MIXERS, MixerConfig(), seed=0)


@pytest.fixture
def hybrid_family(family: Any) -> Any:
    """H1-2/4 of both families in turn."""
    return hybridize(family, MIXERS, MixerConfig(), seed=0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def teacher_folder(llama: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A saved teacher: config, safetensors, tokenizer."""
    folder = tmp_path / "teacher"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def traces(tokenizer: Any) -> Callable[..., Any]:
    """``traces(rows, seed=0, held_out=False)``: packed rows of 64 tokens of short embedded questions."""

    def make(rows: int, seed: int = 0, *, held_out: bool = False) -> Any:
        return EmbeddedTraces(tokenizer, rows, 64, {"mod": 1.0, "add": 1.0, "sort": 1.0}, seed, held_out=held_out)

    return make
