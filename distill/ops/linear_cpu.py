"""``linear`` in float32 on CPU by oneDNN, whose products are faster than those of MKL (which PyTorch takes for ``mm``)
by a tenth to a third where few rows meet many outputs, as in an LM head (on AMD EPYC, Zen 4; docs/distillation.md).

The operator is the one that TorchInductor compiles ``linear`` to; PyTorch gives it no public name, so that it is looked
for, and ``torch.nn.functional.linear`` stands in where it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [m, E] times weight [V, E] transposed, and the bias [V]; without a gradient of its own."""
    product = onednn()
    if product is None or not rows.dtype == weight.dtype == torch.float32 or rows.device.type != "cpu":
        return torch.nn.functional.linear(rows, weight, bias)
    return product(rows, weight, bias, "none", [], "")


@functools.cache
def onednn() -> Callable[..., Any] | None:
    """oneDNN's operator; None where this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
