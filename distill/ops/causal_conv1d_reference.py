"""The causal convolution in plain PyTorch: a multiply and add a tap, differentiable by autograd.

Any device and dtype; in float64 it is the oracle of `distill.ops.causal_conv1d`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def conv(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`distill.ops.causal_conv1d.causal_conv1d` on tensors that have been checked; shapes as there."""
    batch, steps, channels = x.shape
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, taps - 1)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    weight = weight.to(dtype)
    padded = torch.cat([initial_state.to(x.dtype).transpose(1, 2), x], dim=1)  # [B, K-1+T, D]
    wide = padded.to(dtype)
    total = torch.addcmul(bias.to(dtype), wide[:, taps - 1 :], weight[:, taps - 1])
    final = [padded[:, steps + taps - 2 - back, :] for back in range(taps - 1)]  # the newest first
    cut: Tensor | None = None  # [B, T]: a document starts within the last `back` tokens, so that tap is blind
    for back in range(taps):
        if reset is not None and back > 0:
            starts = functional.pad(reset, (back - 1, 0))[:, :steps]
            cut = starts if cut is None else cut | starts
        if cut is not None and back < taps - 1:
            # A select and not a product: the other document may hold inf or NaN.
            final[back] = final[back].masked_fill(cut[:, -1, None], 0)
        if back > 0:
            seen = wide[:, taps - 1 - back : taps - 1 - back + steps]
            if cut is not None:
                seen = seen.masked_fill(cut[:, :, None], 0)
            total = torch.addcmul(total, seen, weight[:, taps - 1 - back])
    state = torch.stack(final[::-1], dim=-1) if final else x.new_zeros(batch, channels, 0)
    return functional.silu(total).to(x.dtype), state.detach()


@torch.no_grad()
def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`distill.ops.causal_conv1d.causal_conv1d_update`; shapes as there."""
    window = torch.cat([state, x.unsqueeze(-1)], dim=-1)
    state.copy_(window[..., 1:])
    if window.dtype == weight.dtype == bias.dtype == x.dtype == torch.float32:
        # The decoding loop of a tiny model is all overhead: no conversions that change nothing.
        return functional.silu(window.mul_(weight).sum(-1).add_(bias), inplace=True)
    dtype = torch.promote_types(torch.promote_types(window.dtype, weight.dtype), torch.float32)
    return functional.silu((window.to(dtype) * weight.to(dtype)).sum(-1) + bias.to(dtype)).to(x.dtype)
