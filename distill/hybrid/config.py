"""Hybrid configs: a teacher family's config plus the mixer of every block.

``layer_types`` follows from ``mixers``, so transformers' own caches give each block the slot that it needs.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig

from distill.config import MixerConfig
from distill.errors import UserError
from distill.mixers import ATTENTION, mixer_class

MIXER_KEYS = ("d_state", "d_conv", "mil_layout", "z_init", "conv_init")


def mixer_options(config: MixerConfig) -> dict[str, Any]:
    """The part of the mixer's config that shapes the module; it is saved with the checkpoint."""
    return {key: getattr(config, key) for key in MIXER_KEYS}


class HybridConfigMixin:
    """Adds ``mixers`` (a mixer name per block) and ``mixer_config`` to a family's config."""

    mixers: list[str] | None
    mixer_config: dict[str, Any] | None
    num_hidden_layers: int

    @property
    def layer_types(self) -> list[str]:
        """transformers' name for what each block caches: keys and values, or a state of fixed size."""
        return [
            "full_attention" if mixer == ATTENTION else "linear_attention"
            for mixer in self.mixers or [ATTENTION] * self.num_hidden_layers
        ]

    def check_mixers(self) -> None:
        """Raise UserError where the placement has the wrong length or a mixer does not fit the shapes."""
        assert self.mixers is not None
        if len(self.mixers) != self.num_hidden_layers:
            raise UserError(f"placement has {len(self.mixers)} mixers for {self.num_hidden_layers} blocks")
        if ATTENTION not in self.mixers:
            raise UserError("at least one block must keep attention (transformers' cache counts tokens there)")
        for name in sorted(set(self.mixers) - {ATTENTION}):
            mixer_class(name).check(self)


class HybridLlamaConfig(HybridConfigMixin, LlamaConfig):
    """Llama with replaced mixers."""

    model_type = "hybrid_llama"
    mixers: list[str] | None = None
    mixer_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixer_config = {**mixer_options(MixerConfig()), **(self.mixer_config or {})}
        super().__post_init__(**kwargs)


class HybridMistralConfig(HybridConfigMixin, MistralConfig):
    """Mistral (without a sliding window) with replaced mixers."""

    model_type = "hybrid_mistral"
    mixers: list[str] | None = None
    mixer_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixer_config = {**mixer_options(MixerConfig()), **(self.mixer_config or {})}
        super().__post_init__(**kwargs)
