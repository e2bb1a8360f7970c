"""Hybrid models: a family's own causal LM, in which the blocks that the config names have another mixer.

Everything else (weights' names, generation, saving, gradient checkpointing) is the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from distill.hybrid import decoding
from distill.hybrid.config import hybrid_config_class
from distill.hybrid.generation import Generation
from distill.hybrid.reading import Reader
from distill.mixers import ATTENTION, mixer_class

INITIALISED = "_is_hf_initialized"  # transformers' mark on a module, and on a parameter that a checkpoint gave
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


class HybridMixin:
    """Puts the mixers in place and tells them where documents begin; for a backbone by itself or with a head."""

    config: Any
    base_model: Any
    modules: Callable[[], Iterator[Any]]
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
                self.base_model.layers[block].self_attn = mixer_class(name)(self.config, block)
        self._is_stateful = set(self.config.mixers) != {ATTENTION}
        if self._is_stateful:
            self.base_model.register_forward_pre_hook(Reader(self.config), with_kwargs=True)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The family's initialisation, and each new mixer's own behind it; what a checkpoint gave stays as it is.

        Not in ``_init_weights``, of which transformers asks the backbone by itself, which is the family's.
        """
        mixers = [module for module in self.modules() if hasattr(module, "mil_slots")]
        new = [mixer for mixer in mixers if not getattr(mixer, INITIALISED, False)]
        super().initialize_weights()  # type: ignore[misc]
        for mixer in new:
            every = list(mixer.parameters())
            given = [(parameter, parameter.clone()) for parameter in every if getattr(parameter, INITIALISED, False)]
            here = all(parameter.numel() for parameter in every)  # not so in ZeRO-3, which shards a module once built
            if here and len(given) < len(every):
                mixer.reset_parameters()
                for parameter, value in given:
                    parameter.copy_(value)


class HybridCausalLMMixin(Generation, HybridMixin):
    """Adds what a hybrid with an LM head does besides: generation, and a loss in place of the logits."""

    model: Any
    lm_head: nn.Module

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        objective: Objective | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """The family's forward, its parameters by name: ``generate`` and trainers look for them (and without
        ``logits_to_keep`` a prefill would make the logits of every token of the prompt). With ``objective``,
        returns its loss and computes no logits, so that the loss can go through the head in chunks, inside whatever
        wraps this module."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        nothing_else = objective is None and labels is None and inputs_embeds is None and use_cache is not False
        if nothing_else and self._is_stateful and input_ids is not None and decoding.only_asks_for(kwargs):
            logits = decoding.step(self, input_ids, past_key_values, attention_mask, position_ids)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        if objective is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs, **kwargs)  # type: ignore[misc]
        hidden = self.model(**inputs, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=objective(head_input(self, hidden), self.lm_head))


def hybrid_classes(teacher: Any, **traits: bool) -> tuple[Any, Any]:
    """Config and model of the hybrids of a family, from its own causal LM; transformers' Auto classes then know them,
    and the backbone by itself (``AutoModel``), and this module has them by name, so that they can be pickled.

    ``traits``: see ``HybridConfigMixin``.
    """
    config = hybrid_config_class(teacher.config_class, **traits)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, mixin, base in (
        (AutoModel, HybridMixin, MODEL_MAPPING[teacher.config_class]),
        (AutoModelForCausalLM, HybridCausalLMMixin, teacher),
    ):
        doc = f"{base.__name__} whose blocks have the mixers that ``config.mixers`` names."
        keys = {"__module__": __name__, "__doc__": doc, "config_class": config}
        model = globals()[f"Hybrid{base.__name__}"] = type(f"Hybrid{base.__name__}", (mixin, base), keys)
        auto.register(config, model, exist_ok=True)
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
