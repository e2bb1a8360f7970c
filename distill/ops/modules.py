"""The modules of a mixer that hold weights of an operator beside projections: the convolution and the norms of heads.

Each uses its weights in its own ``forward`` and nowhere else, so that whatever brings weights in just before a
module's forward and takes them away behind it (offloading to CPU or disk, sharding) does so for these too. The compiled
decoding step, which reads them itself, leaves weights that are not there to these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill.ops.causal_conv1d import causal_conv1d, causal_conv1d_update


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution with SiLU over ``channels``; weight [D, 1, K] and bias [D], as Mamba has them."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, D] to outputs [B, T, D] and the state [B, D, K-1]; ``options``: see ``causal_conv1d``.

        x [B, D] is one token: ``options`` are those of ``causal_conv1d_update``, whose ``state`` [B, D, K-1] is
        updated in place; outputs are [B, D].
        """
        assert self.bias is not None
        taps = self.weight.squeeze(1)
        if x.ndim == 2:
            state = options.pop("state")
            return causal_conv1d_update(state, x, taps, self.bias, **options), state
        return causal_conv1d(x, taps, self.bias, **options)


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of every head by itself, with one weight [head_dim] for all, as in a teacher with norms of q and k."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [..., heads * head_dim], normed in at least fp32."""
        exact = torch.promote_types(states.dtype, torch.float32)
        heads = states.to(exact).unflatten(-1, (-1, *self.normalized_shape))
        normed = F.rms_norm(heads, self.normalized_shape, self.weight.to(exact), self.eps)
        return normed.to(states.dtype).flatten(-2)


class GatedRMSNorm(nn.RMSNorm):
    """Mamba-2's norm behind the gate: every head by itself, with a weight [heads * head_dim]."""

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """RMSNorm of y * SiLU(z), in at least fp32. y [B, T, H, P], z [B, T, H * P]; returns [B, T, H * P]."""
        exact = torch.promote_types(y.dtype, torch.float32)
        gated = y.to(exact) * F.silu(z.to(exact)).unflatten(-1, y.shape[-2:])
        normed = F.rms_norm(gated, y.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.to(exact)).to(z.dtype)
