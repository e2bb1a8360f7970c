"""Hybrid models: a family's own causal LM, in which the blocks that the config names have another mixer.

Everything else (weights' names, generation, saving, gradient checkpointing) is the family's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from distill.hybrid.config import HybridLlamaConfig, HybridMistralConfig
from distill.mixers import ATTENTION, mixer_class

Objective = Callable[[torch.Tensor, nn.Module], torch.Tensor]
"""``objective(hidden [B, T, E], lm_head) -> loss``, evaluated inside forward in place of the logits."""


def document_starts(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, shape: tuple[int, int], past: bool
) -> torch.Tensor | None:
    """Where recurrent states begin anew: position 0 of a packed document, or the first token after padding.

    Args:
        position_ids: [B or 1, T] or None; attention_mask: [B, past + T] (1 = token) or None.
        shape: (B, T) of the tokens at hand. past: whether a cache holds earlier tokens.

    Returns:
        bool [B, T], or None where nothing begins after the first token (and nothing is padded).
    """
    batch, length = shape
    if past and length == 1 and (attention_mask is None or attention_mask.ndim != 2):
        return None
    starts = None
    if position_ids is not None and position_ids.ndim == 2:
        zeros = position_ids[:, :length] == 0
        if bool(zeros[:, 1:].any()):
            starts = zeros.expand(batch, length)
    if attention_mask is not None and attention_mask.ndim == 2 and not bool(attention_mask.all()):
        token = attention_mask[:, -length:].bool()
        before = nn.functional.pad(attention_mask.bool(), (1, 0))[:, -length - 1 : -1]
        after_padding = token & ~before
        starts = after_padding if starts is None else starts | after_padding
        if past and length == 1 and not bool(starts.any()):
            return None
    return starts


def mark_documents(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before the forward of a hybrid's backbone: adds ``document_starts``, which its mixers read.

    On the backbone and not on the whole model, because a trainer with a fused LM head (TRL's) calls it directly:
    without the marks, states would run from one packed document into the next.
    """
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None, "input_ids or inputs_embeds"
    past = kwargs.get("past_key_values")
    past = past is not None and past.get_seq_length() > 0
    shape = (tokens.shape[0], tokens.shape[1])
    starts = document_starts(kwargs.get("position_ids"), kwargs.get("attention_mask"), shape, past)
    return args, {**kwargs, "document_starts": starts}


class HybridMixin:
    """Puts the mixers in place and tells them where documents begin."""

    config: Any
    model: Any
    lm_head: nn.Module
    _is_stateful = True  # generation must not roll a recurrent state back
    _keep_in_fp32_modules_strict = ("A_log", r"self_attn\.D$")

    def _place_mixers(self) -> None:
        self.config.check_mixers()
        for block, name in enumerate(self.config.mixers):
            if name != ATTENTION:
                self.model.layers[block].self_attn = mixer_class(name)(self.config, block)
        if set(self.config.mixers) != {ATTENTION}:
            self.model.register_forward_pre_hook(mark_documents, with_kwargs=True)

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
        return CausalLMOutputWithPast(loss=objective(hidden, self.lm_head))


class HybridLlamaForCausalLM(HybridMixin, LlamaForCausalLM):
    """Llama whose blocks have the mixers that ``config.mixers`` names."""

    config_class = HybridLlamaConfig

    def __init__(self, config: HybridLlamaConfig) -> None:
        super().__init__(config)
        self._place_mixers()
        self.post_init()


class HybridMistralForCausalLM(HybridMixin, MistralForCausalLM):
    """Mistral whose blocks have the mixers that ``config.mixers`` names."""

    config_class = HybridMistralConfig

    def __init__(self, config: HybridMistralConfig) -> None:
        super().__init__(config)
        self._place_mixers()
        self.post_init()


FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (HybridLlamaConfig, HybridLlamaForCausalLM),
    "mistral": (HybridMistralConfig, HybridMistralForCausalLM),
}
"""Teacher's model_type -> hybrid config and model."""

for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
