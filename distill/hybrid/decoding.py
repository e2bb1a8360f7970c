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
from distill.ops.kernels import has_numba, readable
from distill.ops.kernels import serves as kernels_serve
from distill.ops.modules import CausalConv1d, GatedRMSNorm
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
BETWEEN: dict[str, type] = {"conv1d": CausalConv1d, "dt_proj": nn.Linear, "norm": GatedRMSNorm}
"""What a mixer has between its projections that a compiled step knows. (Norms of B and C it does not.)"""
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
    if hidden.dtype != torch.float32:
        return None
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
    from distill.ops import block_cpu, chain_cpu  # only here: they need numba

    mixers = [block.self_attn for block in blocks]
    states = [_states(mixer, cache) for mixer in mixers]
    inputs: list[Any] = [mixer.in_proj.weight if found else None for mixer, found in zip(mixers, states, strict=True)]
    inputs.append(None)
    norms = [block.input_layernorm for block in blocks] + [backbone.norm]

    def rest(place: int) -> tuple[Any, ...]:
        """What follows block ``place``'s mixer: its norm and MLP, the next norm, what the next mixer begins with."""
        mlp, norm = blocks[place].mlp._modules, blocks[place].post_attention_layernorm
        weights = tuple(mlp[name]._parameters["weight"] for name in ("gate_proj", "up_proj", "down_proj"))
        following = norms[place + 1]
        scales = [(each._parameters["weight"], each.variance_epsilon) for each in (norm, following)]
        return scales[0], weights, scales[1], inputs[place + 1]

    carry, hidden = norms[0](hidden)[:, 0], hidden[:, 0]
    if states[0]:
        carry = mixers[0].in_proj(carry)
    place = 0
    while place < len(blocks):
        mixer = mixers[place]
        if not states[place]:
            mixed = mixer(hidden_states=carry[:, None], **options)[0][:, 0]
            hidden, carry = block_cpu.rest(hidden, mixed, *rest(place))
            place += 1
            continue
        chain: list[Any] = []
        while place < len(blocks) and (found := states[place]) and type(mixers[place]) is type(mixer):
            weights, project = mixers[place].step_weights(), mixers[place].out_proj.weight
            block = chain_cpu.Block(weights, found, inputs[place], project, *rest(place))
            if chain and block.shapes() != chain[0].shapes():
                break
            chain.append(block)
            place += 1
        hidden, carry = mixer.through(hidden, carry, chain)
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
    return _norm(backbone.norm, kinds[2]) and all(_fits(block, *kinds) for block in backbone.layers)


def reads(model: Any, cache: Any, mask: Tensor | None, shape: torch.Size) -> bool:
    """Whether a hybrid's mixers need nothing beside the token: rows have begun, and padding is behind them."""
    hooks = [hook for hook in model.model._forward_pre_hooks.values() if isinstance(hook, Reader)]
    return all(hook.decodes(cache, mask, shape) for hook in hooks)


def _states(mixer: Any, cache: Any) -> tuple[Tensor, Tensor] | None:
    """The states of a mixer that is nothing but its two projections and a compiled step between them; else None."""
    if not hasattr(mixer, "step_weights"):
        return None
    own = mixer._modules
    if not _plain(mixer, type(mixer)) or not all(_linear(own[name]) for name in ("in_proj", "out_proj")):
        return None
    between = [(name, module) for name, module in own.items() if name not in ("in_proj", "out_proj")]
    if not all(name in BETWEEN and _plain(module, BETWEEN[name]) for name, module in between):
        return None
    states = carried(cache, mixer.layer_idx)
    return states if kernels_serve(mixer.kernels, *states, *mixer.step_weights()) else None


def _fits(block: nn.Module, kind: type, mlp_kind: type, norm: type) -> bool:
    # A module's own __getattr__ costs ten times a dictionary's look-up, and this is asked for every block and token.
    parts = block._modules
    mlp: Any = parts["mlp"]
    return (
        _plain(block, kind)
        and _plain(mlp, mlp_kind)
        and type(mlp._modules["act_fn"]) is SILU
        and _norm(parts["input_layernorm"], norm)
        and _norm(parts["post_attention_layernorm"], norm)
        and all(_linear(mlp._modules[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    )


def _plain(module: Any, kind: type) -> bool:
    """Whether calling ``module`` is what its class says, and no more: no hook, no other forward put in its place."""
    own = module.__dict__
    return type(module) is kind and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _norm(module: Any, kind: type) -> bool:
    return _plain(module, kind) and readable(module._parameters["weight"])


def _linear(layer: Any) -> bool:
    if not _plain(layer, nn.Linear) or layer._parameters["bias"] is not None:
        return False
    weight: Tensor = layer._parameters["weight"]
    return weight.numel() <= LARGEST and readable(weight)
