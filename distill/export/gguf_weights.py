"""The tensors of a GGUF file from those of the GraniteMoeHybrid container: names, order of rows, twice the heads.

llama.cpp's ``granitehybrid`` wants SSM layers twice as wide as the model. So every SSM head stands there twice, beside
itself in its own group, and what goes out is halved: the same numbers, for the gated norm of a group is over equal
halves. (Heads of zeros in a group would change that norm.) Models of attention alone go out as ``granite``.

Legend: E = hidden size, H = heads of the container, P = head_dim (E = H * P), K = taps of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from distill.export.granite import padding
from distill.export.granite_weights import DOWN, GATE_UP, SAME, Read, Tensors, to_container
from distill.mixers import ATTENTION

OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    SAME[0]: "attn_norm.weight",
    SAME[1]: "ffn_norm.weight",
    DOWN: "ffn_down.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
}
"""Tensors of a block that go out as they are."""
WHOLE = ("ssm_a", "ssm_d", "ssm_conv1d.weight")
"""Tensors that llama.cpp reads in float32, whatever the type of the file, beside those of one dimension."""


def architecture(config: Any) -> str:
    """llama.cpp's name for a hybrid with this config: ``granitehybrid`` asserts that there is an SSM layer."""
    return "granite" if set(config.mixers) == {ATTENTION} else "granitehybrid"


def to_gguf(config: Any, read: Read) -> Tensors:
    """(name, tensor) of a GGUF file, from a hybrid's tensors, block by block; in the types that they come in."""
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors
    for name, tensor in to_container(config, read):
        if name in OUTER:
            yield OUTER[name], tensor
            continue
        _, _, block, inner = name.split(".", 3)
        for theirs, value in block_tensors(config, inner, tensor):
            yield f"blk.{block}.{theirs}", value


def block_tensors(config: Any, name: str, tensor: torch.Tensor) -> Tensors:
    """What a tensor of a block becomes."""
    heads = padding(config)
    if name in INNER:
        yield INNER[name], tensor
    elif name == GATE_UP:
        yield from zip(("ffn_gate.weight", "ffn_up.weight"), tensor.chunk(2), strict=True)
    elif name.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
        count = heads.padded if "q_proj" in name else heads.kv_heads
        yield f"attn_{name[10]}.{name.rpartition('.')[2]}", interleaved(tensor, count)
    else:
        yield SSM[name.removeprefix("mamba.")](tensor, heads.padded, heads.width)


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * P, ...] of queries or keys, of which RoPE turns i and i + P/2 together, for one that turns 2i and
    2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def twice(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Rows [H * width, ...] -> [2 H * width, ...]: every head behind itself."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(2, dim=0).flatten(0, 1)


def _in_proj(rows: torch.Tensor, heads: int, width: int) -> tuple[str, torch.Tensor]:
    z, x, b, c, dt = rows.split([heads * width] * 4 + [heads])
    return "ssm_in.weight", torch.cat([twice(z, width), twice(x, width), b, c, twice(dt, 1)])


def _conv(rows: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    x, b_and_c = rows.split([heads * width, 2 * heads * width])
    return torch.cat([twice(x, width), b_and_c])


def _out_proj(weight: torch.Tensor, heads: int, width: int) -> tuple[str, torch.Tensor]:
    return "ssm_out.weight", (twice(weight.T, width).T / 2).contiguous()


SSM: dict[str, Callable[[torch.Tensor, int, int], tuple[str, torch.Tensor]]] = {
    "in_proj.weight": _in_proj,
    "conv1d.weight": lambda rows, heads, width: ("ssm_conv1d.weight", _conv(rows, heads, width).squeeze(1)),
    "conv1d.bias": lambda rows, heads, width: ("ssm_conv1d.bias", _conv(rows, heads, width)),
    "dt_bias": lambda rows, heads, width: ("ssm_dt.bias", twice(rows, 1)),
    "A_log": lambda rows, heads, width: ("ssm_a", -torch.exp(twice(rows, 1).float())[:, None]),
    "D": lambda rows, heads, width: ("ssm_d", twice(rows, 1)[:, None]),
    "norm.weight": lambda rows, heads, width: ("ssm_norm.weight", twice(rows, width).view(heads, 2 * width)),
    "out_proj.weight": _out_proj,
}
"""Of a Mamba layer: (rows, H, P) -> name and tensor."""


def kept_whole(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor stays in float32 whatever the type of the file."""
    return tensor.dim() == 1 or name.endswith((*WHOLE, "norm.weight"))


def rope_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies of RoPE by [P / 2], where they are scaled as in Llama 3; None elsewhere.

    As in transformers: wavelengths beyond the old context over ``low_freq_factor`` are stretched by ``factor``, those
    within it over ``high_freq_factor`` stay, and between the two the inverse factors are mixed.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    low, high, old = (
        rope[f"{key}"] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    kept = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float()
