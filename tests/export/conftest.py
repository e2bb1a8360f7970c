"""Random hybrids that fit the container, and small tokenizers of the kinds that a GGUF file holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize

FITTING = ("llama", "mistral", "qwen2", "granite")
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def teacher_of(family: str, rng: random.Random) -> Any:
    """A random model of a family: any number of heads, groups and blocks that the container can hold."""
    width, kv, served, spare = rng.choice([8, 16]), rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([0, 0, 1])
    hidden = kv * (served + spare) * width
    keys: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": kv * served,
        "num_key_value_heads": kv,
        "intermediate_size": rng.choice([24, 40]),
        "num_hidden_layers": rng.choice([2, 3]),
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rng.choice([SCALED, {"rope_type": "default", "rope_theta": 7_000.0}]),
        "pad_token_id": None,
    }
    if spare or rng.random() < 0.5:
        keys["head_dim"] = width
    if family in ("llama", "granite"):
        keys["attention_bias"] = rng.random() < 0.3
    if family == "granite":
        keys |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
        keys["attention_multiplier"] = 0.3
    if family == "mistral":
        keys["sliding_window"] = None
    config = AutoConfig.for_model(family, **keys)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not all ones and zeros
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def save_hybrid(seed: int, folder: Path, family: str | None = None) -> Any:
    """A random hybrid of a random teacher, in float32, in ``folder``."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    teacher = teacher_of(family or rng.choice(FITTING), rng)
    blocks = teacher.config.num_hidden_layers
    mixers = ["mamba2" if rng.random() < 0.6 else "attention" for _ in range(blocks)]
    mixers[0], mixers[-1] = ("mamba2", "attention") if rng.random() < 0.9 else ("attention", "attention")
    hybrid = hybridize(teacher, mixers, MixerConfig(name="mamba2", d_conv=rng.choice([2, 4])), seed=seed).eval()
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith(("A_log", "dt_bias", ".D", "norm.weight")):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    hybrid.save_pretrained(folder)
    return hybrid


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: Any, *, whole: bool = False) -> Tokenizer:
    """A byte-level BPE of 256 letters and two merges behind ``split``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate([*letters, "th", "the"])}
    core = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], ignore_merges=whole))
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    return core


def isolated(*patterns: str) -> Any:
    """Splits by each pattern, then letters for bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def fallback(pieces: list[str], merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """A BPE with byte fallback over ``pieces``, the best first; by default with every merge that makes one of them."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for piece in pieces for letter in piece})
    vocab = {token: place for place, token in enumerate([*base, *(p for p in pieces if len(p) > 1), *letters])}
    every = [(p[:cut], p[cut:]) for p in pieces for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    core = Tokenizer(models.BPE(vocab, every if merges is None else merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return core


@pytest.fixture
def saved_hybrid() -> Callable[..., Any]:
    """``(seed, folder, family) -> hybrid``."""
    return save_hybrid


@pytest.fixture
def cores() -> Any:
    """Builders of tokenizers."""
    return SimpleNamespace(split=SPLIT, byte_level=byte_level, isolated=isolated, fallback=fallback)
