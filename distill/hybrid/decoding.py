"""One token for a batch without the calls around the work: what a block does beside its mixer is one compiled pass.

The family's own forward is the reference, and serves every case but this one: float32 on CPU, a cache that holds what
came before, no gradients, modules as the family made them (no adapters, no hooks, no offloading), blocks small enough.
It is the same step for a hybrid and for its teacher, so that neither is timed with what the other lacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from distill.hybrid.reading import Reader
from distill.ops.kernels import has_numba
from distill.ops.kernels import serves as kernels_serve
from distill.ops.states import carried

BACKBONES: dict[type, tuple[type, type, type]] = {
    llama.LlamaModel: (llama.LlamaDecoderLayer, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralModel: (mistral.MistralDecoderLayer, mistral.MistralMLP, mistral.MistralRMSNorm),
    qwen2.Qwen2Model: (qwen2.Qwen2DecoderLayer, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    qwen3.Qwen3Model: (qwen3.Qwen3DecoderLayer, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
    smollm3.SmolLM3Model: (smollm3.SmolLM3DecoderLayer, smollm3.SmolLM3MLP, smollm3.SmolLM3RMSNorm),
}
"""Those whose blocks are x + mixer(norm(x)), then x + mlp(norm(x)), and the classes of their parts. (Granite scales its
residuals.)"""
SILU = type(ACT2FN["silu"])
LARGEST = 1 << 20
"""Weights of an MLP from which on PyTorch's own products are worth their calls."""


def step(model: Any, tokens: Tensor, cache: Any, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Logits ``[B, 1, V]`` of one more token ``[B, 1]``, which the cache takes in; None where this is no case for it,
    and nothing has been done.

    Args:
        model: a causal LM of transformers, hybrid or not. mask: of padding, ``[B, S + 1]``. positions: ``[B or 1, 1]``.
    """
    if tokens.shape[1] != 1 or cache is None or isinstance(mask, dict):
        return None
    if not serves(model) or not reads(model, cache, mask, tokens.shape):
        return None
    backbone, config = model.model, model.config
    blocks = backbone.layers[: config.num_hidden_layers]
    hidden = backbone.embed_tokens(tokens)
    if positions is None:
        positions = torch.full((1, 1), cache.get_seq_length(), device=tokens.device)
    options: dict[str, Any] = {
        "attention_mask": create_causal_mask(
            config=config, inputs_embeds=hidden, attention_mask=mask, past_key_values=cache, position_ids=positions
        ),
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
        "position_embeddings": backbone.rotary_emb(hidden, positions),
    }
    from distill.ops import block_cpu  # only here: it needs numba

    mixers = [block.self_attn for block in blocks]
    states = [_states(mixer, cache) for mixer in mixers]
    inputs = [mixer.in_proj.weight if found else None for mixer, found in zip(mixers, states, strict=True)]
    norms = [*(block.input_layernorm for block in blocks), backbone.norm]
    carry, hidden = norms[0](hidden)[:, 0], hidden[:, 0]
    if states[0]:
        carry = mixers[0].in_proj(carry)
    for place, (block, mixer) in enumerate(zip(blocks, mixers, strict=True)):
        project = None
        if found := states[place]:
            mixed, project = mixer.compiled_step(carry, *found), mixer.out_proj.weight
        else:
            mixed = mixer(hidden_states=carry[:, None], **options)[0][:, 0]
        mlp, norm, following = block.mlp._modules, block.post_attention_layernorm, norms[place + 1]
        hidden, carry = block_cpu.rest(
            hidden,
            mixed,
            project,
            (norm.weight, norm.variance_epsilon),
            (mlp["gate_proj"].weight, mlp["up_proj"].weight, mlp["down_proj"].weight),
            (following.weight, following.variance_epsilon),
            inputs[place + 1] if place + 1 < len(blocks) else None,
        )
    logits: Tensor = model.lm_head(carry[:, None])
    return logits


def only_asks_for(options: dict[str, Any]) -> bool:
    """Whether ``options`` of a forward ask for nothing but logits, in the output of transformers' own kind."""
    asked = {name for name, value in options.items() if value is not None}
    return asked <= {"return_dict", "cache_position"} and options.get("return_dict") is not False


def serves(model: Any) -> bool:
    """Whether the blocks of ``model`` are such as the compiled pass computes."""
    backbone: Any = getattr(model, "model", None)
    config = model.config
    kinds = BACKBONES.get(type(backbone))
    if kinds is None or torch.is_grad_enabled() or model.training or torch.compiler.is_compiling() or not has_numba():
        return False
    window = kinds[0] is mistral.MistralDecoderLayer and config.sliding_window is not None
    if window or getattr(backbone, "has_sliding_layers", False):
        return False
    if config.output_hidden_states or config.output_attentions or not config.return_dict:
        return False
    own: dict[str, Any] = backbone.__dict__
    if own["_forward_hooks"] or "forward" in own:
        return False
    if any(not isinstance(hook, Reader) for hook in own["_forward_pre_hooks"].values()):
        return False
    return _plain(backbone.norm, kinds[2]) and all(_fits(block, *kinds) for block in backbone.layers)


def reads(model: Any, cache: Any, mask: Tensor | None, shape: torch.Size) -> bool:
    """Whether a hybrid's mixers need nothing beside the token: rows have begun, and padding is behind them."""
    hooks = [hook for hook in model.model._forward_pre_hooks.values() if isinstance(hook, Reader)]
    return all(hook.decodes(cache, mask, shape) for hook in hooks)


def _states(mixer: Any, cache: Any) -> tuple[Tensor, Tensor] | None:
    """The states of a mixer that is nothing but its two projections and a compiled step between them; else None."""
    if not hasattr(mixer, "compiled_step"):
        return None
    own = [module for name, module in mixer._modules.items() if name not in ("in_proj", "out_proj", "dt_proj")]
    if mixer.b_norm is not None or not all(_linear(layer) for layer in (mixer.in_proj, mixer.out_proj)):
        return None
    if not all(_plain(module, type(module)) for module in (mixer, *own) if module is not None):
        return None
    states = carried(cache, mixer.layer_idx)
    return states if kernels_serve(mixer.kernels, *states, mixer.A_log, mixer.conv1d.weight) else None


def _fits(block: nn.Module, kind: type, mlp_kind: type, norm: type) -> bool:
    # A module's own __getattr__ costs ten times a dictionary's look-up, and this is asked for every block and token.
    parts = block._modules
    mlp: Any = parts["mlp"]
    return (
        _plain(block, kind)
        and _plain(mlp, mlp_kind)
        and type(mlp._modules["act_fn"]) is SILU
        and _plain(parts["input_layernorm"], norm)
        and _plain(parts["post_attention_layernorm"], norm)
        and all(_linear(mlp._modules[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    )


def _plain(module: Any, kind: type) -> bool:
    """Whether calling ``module`` is what its class says, and no more: no hook, no other forward put in its place."""
    own = module.__dict__
    return type(module) is kind and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _linear(layer: Any) -> bool:
    if not _plain(layer, nn.Linear) or layer._parameters["bias"] is not None:
        return False
    weight = layer._parameters["weight"]
    return weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous() and 0 < weight.numel() <= LARGEST
