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
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from distill.hybrid.config import hybrid_config_class
from distill.hybrid.offload import preload_mixers
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


def tokens_given(args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a backbone was called on: ids [B, T] or embeddings [B, T, E]."""
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    assert tokens is not None, "input_ids or inputs_embeds"
    return tokens


def mark_documents(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before the forward of a hybrid's backbone: adds ``document_starts``, which its mixers read.

    On the backbone and not on the whole model, because a trainer with a fused LM head (TRL's) calls it directly:
    without the marks, states would run from one packed document into the next.
    """
    shape = tokens_given(args, kwargs).shape
    past = kwargs.get("past_key_values")
    past = past is not None and past.get_seq_length() > 0
    starts = document_starts(kwargs.get("position_ids"), kwargs.get("attention_mask"), (shape[0], shape[1]), past)
    return args, {**kwargs, "document_starts": starts}


def name_masks(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook for families whose blocks look their mask up by layer type: they would make none for ``linear_attention``.

    The mask of the attention blocks is the one that the family itself would make.
    """
    tokens = tokens_given(args, kwargs)
    sizes = torch.empty((*tokens.shape[:2], 0), dtype=module.dtype, device=tokens.device)
    given = {key: kwargs.get(key) for key in ("attention_mask", "past_key_values", "position_ids")}
    mask = create_causal_mask(config=module.config, inputs_embeds=sizes, **given)
    return args, {**kwargs, "attention_mask": {"full_attention": mask, "linear_attention": None}}


class HybridMixin:
    """Puts the mixers in place and tells them where documents begin."""

    config: Any
    model: Any
    lm_head: nn.Module
    post_init: Callable[[], None]
    _is_stateful = True  # generation must not roll a recurrent state back
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
        if set(self.config.mixers) != {ATTENTION}:
            self.model.register_forward_pre_hook(preload_mixers)
            self.model.register_forward_pre_hook(mark_documents, with_kwargs=True)
            if hasattr(self.model, "has_sliding_layers"):
                self.model.register_forward_pre_hook(name_masks, with_kwargs=True)

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
        labels: torch.Tensor | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's forward. With ``objective``, returns its loss and computes no logits (so that the loss
        can go through the head in chunks, inside whatever wraps this module). ``labels`` stands here by name because
        a Trainer drops the columns of its data that the signature has not."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        if objective is None:
            return super().forward(labels=labels, **inputs, **kwargs)  # type: ignore[misc]
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
