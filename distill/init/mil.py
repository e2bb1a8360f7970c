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

    What no slot covers (z, dt, A, D, the convolution), and a norm that the attention has not, keeps the mixer's own
    start.
    """
    for slot, (name, rows) in mixer.mil_slots().items():
        if slot.endswith("_norm") and not hasattr(attention, SOURCES[slot]):
            continue
        source, target = getattr(attention, SOURCES[slot]), getattr(mixer, name)
        target.weight[rows].copy_(source.weight)
        if getattr(source, "bias", None) is not None:
            target.bias[rows].copy_(source.bias)
