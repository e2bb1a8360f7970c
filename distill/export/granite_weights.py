"""The container's tensors from a hybrid's, and back: names, order of rows, heads of zeros.

Both ways go block by block through ``read``, a function from a tensor's name to the tensor, so that never more than a
block is in memory. Names below are those inside a block, ``model.layers.N.``.

Legend: E = hidden size, H = query heads, P = head_dim, H' = heads of the container; Mamba rows are z, x, B, C [H * P
each], dt [H].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from distill.export.granite import HeadPadding, has_bias, padding
from distill.mixers import ATTENTION

Read = Callable[[str], torch.Tensor]
Tensors = Iterator[tuple[str, torch.Tensor]]
SAME = ("input_layernorm.weight", "post_attention_layernorm.weight")
GATE_UP, DOWN = "shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"
PER_HEAD = ("dt_bias", "A_log", "D")


def outer_names(config: Any) -> list[str]:
    """Tensors outside the blocks; an output head that is tied to the embeddings is not stored."""
    return [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *([] if config.tie_word_embeddings else ["lm_head.weight"]),
    ]


def to_container(config: Any, read: Read) -> Tensors:
    """(name, tensor) of the container, from a hybrid's tensors."""
    heads = padding(config)
    for name in outer_names(config):
        yield name, read(name)
    for block, mixer in enumerate(config.mixers):
        place = f"model.layers.{block}."
        yield from ((place + name, read(place + name)) for name in SAME)
        yield place + GATE_UP, torch.cat([read(f"{place}mlp.{part}_proj.weight") for part in ("gate", "up")])
        yield place + DOWN, read(place + "mlp.down_proj.weight")
        own = lambda name, place=place: read(f"{place}self_attn.{name}")  # noqa: E731
        if mixer == ATTENTION:
            yield from ((f"{place}self_attn.{name}", tensor) for name, tensor in attention_out(config, heads, own))
        else:
            yield from ((f"{place}mamba.{name}", tensor) for name, tensor in mamba_out(heads, own))


def attention_out(config: Any, heads: HeadPadding, read: Read) -> Tensors:
    """An attention layer with heads of zeros: their queries and their part of the output."""
    yield "q_proj.weight", heads.pad(read("q_proj.weight"))
    for name in ("k_proj.weight", "v_proj.weight"):
        yield name, read(name)
    yield "o_proj.weight", heads.pad(read("o_proj.weight").T).T.contiguous()
    if has_bias(config):
        yield "q_proj.bias", heads.pad(read("q_proj.bias"))
        for name in ("k_proj.bias", "v_proj.bias"):
            yield name, read(name)
        bias = read("v_proj.bias").new_zeros(config.hidden_size) if config.qkv_bias else read("o_proj.bias")
        yield "o_proj.bias", bias


def mamba_out(heads: HeadPadding, read: Read) -> Tensors:
    """A mamba2 mixer with heads of zeros, which put out zero whatever comes in."""
    inner = heads.heads * heads.width
    *parts, dt = read("in_proj.weight").split([inner] * 4 + [heads.heads])
    yield "in_proj.weight", torch.cat([*map(heads.pad, parts), heads.pad(dt, per_head=1)])
    for name in ("conv1d.weight", "conv1d.bias"):
        yield name, torch.cat([heads.pad(part) for part in read(name).split(inner)])
    for name in PER_HEAD:
        yield name, heads.pad(read(name), per_head=1)
    yield "norm.weight", heads.pad(read("norm.weight"))
    yield "out_proj.weight", heads.pad(read("out_proj.weight").T).T.contiguous()


def from_container(config: Any, read: Read) -> Tensors:
    """(name, tensor) of a hybrid with this config, from the container's tensors: the inverse of ``to_container``."""
    heads = padding(config)
    for name in outer_names(config):
        yield name, read(name)
    for block, mixer in enumerate(config.mixers):
        place = f"model.layers.{block}."
        yield from ((place + name, read(place + name)) for name in SAME)
        gate, up = read(place + GATE_UP).chunk(2)
        yield place + "mlp.gate_proj.weight", gate.contiguous()
        yield place + "mlp.up_proj.weight", up.contiguous()
        yield place + "mlp.down_proj.weight", read(place + DOWN)
        kind = "self_attn" if mixer == ATTENTION else "mamba"
        theirs = lambda name, inside=f"{place}{kind}.": read(inside + name)  # noqa: E731
        found = attention_in(config, heads, theirs) if mixer == ATTENTION else mamba_in(heads, theirs)
        yield from ((f"{place}self_attn.{name}", tensor) for name, tensor in found)


def attention_in(config: Any, heads: HeadPadding, read: Read) -> Tensors:
    """The inverse of ``attention_out``."""
    for part in ("weight", "bias") if has_bias(config) else ("weight",):
        yield f"q_proj.{part}", heads.cut(read(f"q_proj.{part}")).contiguous()
        for name in ("k_proj", "v_proj"):
            yield f"{name}.{part}", read(f"{name}.{part}")
    yield "o_proj.weight", heads.cut(read("o_proj.weight").T).T.contiguous()
    if has_bias(config) and not config.qkv_bias:
        yield "o_proj.bias", read("o_proj.bias")


def mamba_in(heads: HeadPadding, read: Read) -> Tensors:
    """The inverse of ``mamba_out``."""
    inner = heads.padded * heads.width
    *parts, dt = read("in_proj.weight").split([inner] * 4 + [heads.padded])
    yield "in_proj.weight", torch.cat([*map(heads.cut, parts), heads.cut(dt, per_head=1)])
    for name in ("conv1d.weight", "conv1d.bias"):
        yield name, torch.cat([heads.cut(part) for part in read(name).split(inner)])
    for name in PER_HEAD:
        yield name, heads.cut(read(name), per_head=1).contiguous()
    yield "norm.weight", heads.cut(read("norm.weight")).contiguous()
    yield "out_proj.weight", heads.cut(read("out_proj.weight").T).T.contiguous()
