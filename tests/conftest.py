"""Tiny random models for every test: 4 blocks, hidden 48, 4 query and 2 KV heads of 32 (so heads * 32 != hidden)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import MixerConfig
from distill.data.families import FAMILIES as QUESTIONS
from distill.data.families import draw
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.data.traces import EmbeddedTraces
from distill.hybrid.config import mixer_options
from distill.hybrid.surgery import hybridize
from distill.mixers import mixer_class

settings.register_profile("any_machine", deadline=None)  # a property is not wrong because the machine is busy
settings.load_profile("any_machine")
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
MIXED = ["mamba2", "attention", "attention", "mamba1"]


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
    """A random model of a family; also what starts at zero or one is away from there (biases, norms).

    ``head_dim=None`` leaves it to the family.
    """
    dropped = {"head_dim"} if keys.get("head_dim", 1) is None else set()

    def make() -> Any:
        every = {**SHAPE, **FAMILIES[family], **keys}
        config = AutoConfig.for_model(family, **{key: every[key] for key in every if key not in dropped})
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ("self_attn" in name and "norm" in name):
                parameter.data += 0.3 * torch.randn_like(parameter)
        return model

    return _random(make)


def random_mixer(name: str, heads: int, kv_heads: int, head_dim: int, seed: int = 3, **options: Any) -> Any:
    """A mixer of hidden size 48 whose every weight is away from its start, where much is 0 or 1."""
    config = SimpleNamespace(
        hidden_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-2,
        mixer_config={**mixer_options(MixerConfig()), "bc_norm": False, **options},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixer = mixer_class(name)(config, 0)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(family, **keys)``: ``random_model``."""
    return random_model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    """A model of every family in turn."""
    return random_model(request.param)


@pytest.fixture
def hybrid(request: pytest.FixtureRequest, llama: Any) -> Any:
    """H1-2/4 of the Llama, or of the family that a test names: the first and the last block have mamba1."""
    teacher = random_model(request.param) if hasattr(request, "param") else llama
    return hybridize(teacher, MIXERS, MixerConfig(), seed=0)


@pytest.fixture(params=[MIXERS, MIXED], ids=["mamba1", "mixed"])
def hybrid_family(request: pytest.FixtureRequest, family: Any) -> Any:
    """H1-2/4 of every family in turn, with mamba1 alone and with mamba2 beside it."""
    return hybridize(family, request.param, MixerConfig(), seed=0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KINDS = ("byte_level", "metaspace", "prepend", "unigram")


def train_tokenizer(kind: str) -> Any:
    """A tokenizer of about 400 pieces trained on the embedded questions, of a kind that real teachers have.

    ``byte_level``: BPE on bytes (Llama 3, Qwen, SmolLM). ``metaspace``, ``prepend``: BPE on words that begin with
    U+2581 and unknown characters as bytes, as Mistral and as Llama 2 are written down. ``unigram``: SentencePiece's
    other model. All but the first put a BOS before a text unless told not to.
    """
    rng = random.Random(0)
    texts = [
        draw(name, rng, held_out=False).messages[turn]["content"]
        for name in QUESTIONS
        for _ in range(80)
        for turn in (0, 1)
    ]
    special = ["<s>", "</s>", "<unk>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    core = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    trainer: Any = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    if kind == "byte_level":
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        metaspace = [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        core.decoder = decoders.Sequence(metaspace)
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind != "byte_level":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "metaspace" else "always")
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    core.train_from_iterator(texts, trainer)
    if kind in ("metaspace", "prepend"):  # the trainer knows no byte pieces: they are put behind what it found
        state = json.loads(core.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary.update({piece: len(vocabulary) + i for i, piece in enumerate(bytes_)})
        state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
        core = Tokenizer.from_str(json.dumps(state))
    if kind != "byte_level":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], Any]:
    """``make_tokenizer(kind)``: ``train_tokenizer``, trained once."""
    return cache(train_tokenizer)


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
