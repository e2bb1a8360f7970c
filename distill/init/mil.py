"""Mamba-in-the-Llama: the new mixer starts from the attention that it replaces.

x <- W_V, B <- W_K, C <- W_Q, out <- W_O (arXiv:2408.15237; Apriel-H1, equation 3). RoPE is not carried over.
"""

from __future__ import annotations

from typing import Any

import torch

SOURCES = {"x": "v_proj", "B": "k_proj", "C": "q_proj", "out": "o_proj", "B_norm": "k_norm", "C_norm": "q_norm"}


@torch.no_grad()
def initialise(mixer: Any, attention: Any) -> None:
    """Copy the projections of ``attention`` into the slots that ``mixer`` declares, biases and norms included.

    A slot with rows for every query head takes those of a key/value head once for each query head that it serves. A
    bias goes to the slot's own, or, where that has none, to the mixer's ``fold_bias(slot, bias)``. What no slot covers
    (z, dt, A, D, the convolution), and a norm that the attention has not, keeps the mixer's own start.
    """
    for slot, (name, rows) in mixer.mil_slots().items():
        if slot.endswith("_norm") and not hasattr(attention, SOURCES[slot]):
            continue
        source, target = getattr(attention, SOURCES[slot]), getattr(mixer, name)
        slots = target.weight[rows]
        slots.copy_(_each_query_head(source.weight, attention, len(slots)))
        bias = getattr(source, "bias", None)
        if bias is not None and target.bias is None:
            mixer.fold_bias(slot, _each_query_head(bias, attention, len(slots)))
        elif bias is not None:
            target.bias[rows].copy_(bias)


def _each_query_head(tensor: torch.Tensor, attention: Any, rows: int) -> torch.Tensor:
    """Rows [heads * head_dim, ...] repeated head by head to ``rows``."""
    repeat = rows // len(tensor)
    return (
        tensor.unflatten(0, (-1, attention.head_dim)).repeat_interleave(repeat, 0).flatten(0, 1)
        if repeat > 1
        else tensor
    )
