"""The container that serving tools know: GraniteMoeHybrid without experts, its config and its obstacles.

A dense GraniteMoeHybrid block is a Llama block whose mixer is attention or Mamba-2 with a state as wide as a head, and
that is `distill.mixers.mamba2`. Serving tools take ``hidden_size // num_attention_heads`` for the head's width, so a
teacher with fewer heads than that gets heads of zeros (`HeadPadding`); one with more cannot be held.

Legend: E = hidden size, H = query heads, K = key/value heads, P = head_dim, H' = E / P heads of the container.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distill.mixers import ATTENTION

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
MODEL_TYPE = "granitemoehybrid"
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip
"""Keys of a teacher's config that the container has under the same name with the same meaning."""


@dataclass(frozen=True)
class HeadPadding:
    """Query heads [H] among the heads [H'] of the container: a key/value head keeps the query heads that it serves,
    and those of zeros stand behind them."""

    heads: int
    kv_heads: int
    padded: int
    width: int

    def pad(self, rows: torch.Tensor, *, per_head: int | None = None) -> torch.Tensor:
        """Rows [H * per_head, ...] (``per_head``: by default P) -> [H' * per_head, ...], zero where no head is."""
        if self.heads == self.padded:
            return rows
        per_head, served = per_head or self.width, self.heads // self.kv_heads
        given = rows.unflatten(0, (self.kv_heads, served * per_head))
        room = given.new_zeros(self.kv_heads, self.padded // self.kv_heads * per_head, *rows.shape[1:])
        room[:, : served * per_head] = given
        return room.flatten(0, 1)

    def cut(self, rows: torch.Tensor, *, per_head: int | None = None) -> torch.Tensor:
        """The inverse of ``pad``."""
        if self.heads == self.padded:
            return rows
        per_head, served = per_head or self.width, self.heads // self.kv_heads
        room = rows.unflatten(0, (self.kv_heads, self.padded // self.kv_heads * per_head))
        return room[:, : served * per_head].flatten(0, 1)


def padding(config: Any) -> HeadPadding:
    """How the heads of a hybrid with this config lie in the container."""
    return HeadPadding(
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.head_dim, config.head_dim
    )


def obstacles(config: Any) -> list[str]:
    """Why a hybrid with this config does not fit the container; empty where it does, and then it fits exactly."""
    found = []
    for name in sorted(set(config.mixers) - {ATTENTION, "mamba2"}):
        blocks = ", ".join(str(block) for block, mixer in enumerate(config.mixers) if mixer == name)
        found.append(f"{name} (block {blocks}), which no other tool holds; mixer.name=mamba2 goes out exactly")
    if config.qk_norm:
        found.append("norms on queries and keys, which the container's attention has not")
    if config.mixer_config["bc_norm"] and "mamba2" in config.mixers:
        found.append("norms on B and C (bc_norm), which the container's Mamba layer has not; mixer.bc_norm=never")
    width, hidden, heads, kv = (
        config.head_dim,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if hidden % width:
        found.append(f"a hidden size of {hidden}, no multiple of head_dim={width}, which serving tools derive from it")
    elif hidden // width < heads:
        found.append(f"{heads} heads of {width} in a width of {hidden}, where {hidden // width} fit")
    elif hidden // width % kv:
        found.append(f"{kv} key/value heads do not divide the {hidden // width} heads of width {width} in {hidden}")
    if config.hidden_act != "silu":
        found.append(f"hidden_act={config.hidden_act}, which would also act inside the container's Mamba layers")
    if getattr(config, "mlp_bias", False):
        found.append("biases in the MLP (mlp_bias)")
    rope = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers  # SmolLM3: 1 has RoPE, 0 has not
    without = [
        str(b) for b, (name, has) in enumerate(zip(config.mixers, rope, strict=True)) if name == ATTENTION and not has
    ]
    if without:
        found.append(f"attention without rotary positions in block {', '.join(without)}; convert these blocks")
    return found


def container_config(config: Any) -> dict[str, Any]:
    """config.json of the container for a hybrid that has no ``obstacles``.

    Written literally: transformers' own ``save_pretrained`` gives ``layer_types`` words that other tools do not read.
    """
    heads = padding(config).padded
    plain = config.to_dict()
    keys = {key: plain[key] for key in SHARED if plain.get(key) is not None}
    rope = keys.get("rope_parameters") or {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **keys,
        "hidden_act": config.hidden_act,
        "num_attention_heads": heads,
        "rope_theta": rope.get("rope_theta"),
        "position_embedding_type": "rope",
        "attention_bias": has_bias(config),
        "attention_multiplier": getattr(config, "attention_multiplier", config.head_dim**-0.5),
        **{key: getattr(config, key, 1.0) for key in MULTIPLIERS},
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config.intermediate_size,
        "layer_types": ["attention" if name == ATTENTION else "mamba" for name in config.mixers],
        "mamba_n_heads": heads,
        "mamba_d_head": config.head_dim,
        "mamba_n_groups": heads,
        "mamba_d_state": config.head_dim,
        "mamba_d_conv": config.mixer_config["d_conv"],
        "mamba_expand": 1,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def has_bias(config: Any) -> bool:
    """Whether the attention of a hybrid has biases: of all its projections, or of q, k and v (Qwen2)."""
    return bool(config.qkv_bias or getattr(config, "attention_bias", False))
