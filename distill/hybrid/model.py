"""Hybrid models: a family's own causal LM, in which the blocks that the config names have another mixer.

Everything else (weights' names, generation, saving, gradient checkpointing) is the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from distill.hybrid.config import hybrid_config_class
from distill.hybrid.generation import Generation
from distill.hybrid.reading import Reader
from distill.mixers import ATTENTION, mixer_class

Objective = Callable[[torch.Tensor, nn.Module], torch.Tensor]
"""``objective(hidden [B, T, E], lm_head) -> loss``, evaluated inside forward in place of the logits. What it is given
is what the head makes the model's logits of (``head_input``)."""


def head_input(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Final hidden states [B, T, E] such that ``lm_head`` of them is the model's logits.

    Whatever goes through the head by itself must come through here: Granite divides its logits by
    ``logits_scaling``, which no part of the head knows.
    """
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scaling == 1.0 else hidden / scaling


class HybridMixin(Generation):
    """Puts the mixers in place and tells them where documents begin."""

    config: Any
    model: Any
    lm_head: nn.Module
    post_init: Callable[[], None]
    _is_stateful: bool  # transformers' name: generation must not roll a recurrent state back
    _keep_in_fp32_modules_strict = ("A_log", r"self_attn\.D$")

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self._place_mixers()
        self.post_init()

    def _place_mixers(self) -> None:
        self.config.check_mixers()
        for block, name in enumerate(self.config.mixers):
            if name != ATTENTION:
                self.model.layers[block].self_attn = mixer_class(name)(self.config, block)
        self._is_stateful = set(self.config.mixers) != {ATTENTION}
        if self._is_stateful:
            self.model.register_forward_pre_hook(Reader(self.config), with_kwargs=True)

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "mil_slots"):
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's forward. With ``objective``, returns its loss and computes no logits (so that the loss
        can go through the head in chunks, inside whatever wraps this module)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        if objective is None:
            return super().forward(**inputs, **kwargs)  # type: ignore[misc]
        hidden = self.model(**inputs, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=objective(head_input(self, hidden), self.lm_head))


def hybrid_classes(teacher: Any, **traits: bool) -> tuple[Any, Any]:
    """Config and model of the hybrids of a family, from its own causal LM; transformers' Auto classes then know them.

    ``traits``: see ``HybridConfigMixin``.
    """
    config = hybrid_config_class(teacher.config_class, **traits)
    doc = f"{teacher.__name__} whose blocks have the mixers that ``config.mixers`` names."
    keys = {"__module__": __name__, "__doc__": doc, "config_class": config}
    model = type(f"Hybrid{teacher.__name__}", (HybridMixin, teacher), keys)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": hybrid_classes(LlamaForCausalLM),
    "mistral": hybrid_classes(MistralForCausalLM),
    "qwen2": hybrid_classes(Qwen2ForCausalLM, qkv_bias=True),
    "qwen3": hybrid_classes(Qwen3ForCausalLM, qk_norm=True),
    "granite": hybrid_classes(GraniteForCausalLM),
    "smollm3": hybrid_classes(SmolLM3ForCausalLM),
}
"""Teacher's model_type -> hybrid config and model."""
