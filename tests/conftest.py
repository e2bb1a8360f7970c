"""Tiny random models for every test: 4 blocks, hidden 48, 4 query and 2 KV heads of 32 (so heads * 32 != hidden)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.75,  # no power of two, so that a place that forgets it shows
    },
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": False, "sliding_window": 16},
}
"""What the tiny model of each family has beside SHAPE."""
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


def random_model(family: str, **keys: Any) -> Any:
    """A random model of a family; also what starts at zero or one is away from there (biases, norms)."""

    def make() -> Any:
        config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **keys})
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ("self_attn" in name and "norm" in name):
                parameter.data += 0.3 * torch.randn_like(parameter)
        return model

    return _random(make)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(family, **keys)``: ``random_model``."""
    return random_model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    """A model of every family in turn."""
    return random_model(request.param)


@pytest.fixture
def hybrid(llama: Any) -> Any:
    """H1-2/4 of the Llama: the first and the last block have mamba1."""
    return hybridize(llama, MIXERS, MixerConfig(), seed=0)


@pytest.fixture
def hybrid_family(family: Any) -> Any:
    """H1-2/4 of every family in turn."""
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
