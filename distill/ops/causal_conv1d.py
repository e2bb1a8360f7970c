"""Depthwise causal convolution over time with SiLU, document starts and a carried state, in plain PyTorch.

The short convolution before the scan in Mamba (arXiv:2312.00752, section 3.4); ``weight[:, K-1]`` meets the
current token, as in ``torch.nn.Conv1d`` with left padding.

    B = batch, T = tokens, D = channels, K = taps
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = silu(bias + sum_k weight[:, K-1-k] x_{t-k})``, summed over the tokens of t's document only.

    Gradients of x, weight, bias and initial_state come from autograd; half types are summed in float32.

    Args:
        x: inputs ``[B, T, D]``.
        weight: taps ``[D, K]``, the oldest first.
        bias: ``[D]``.
        reset: ``[B, T]`` bool; True where a document starts: no tap reaches behind that token.
        initial_state: the K-1 inputs before ``x``, ``[B, D, K-1]``, the oldest first (zeros if None).

    Returns:
        y ``[B, T, D]`` in x's dtype, and the final state ``[B, D, K-1]`` in x's dtype, detached: the last K-1
        inputs of the current document, zero where it is shorter.

    Raises:
        ValueError: a wrong shape or dtype, before any work.
    """
    if x.ndim != 3 or weight.ndim != 2:
        given = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"x must be [B, T, D] and weight [D, K], got {given}")
    batch, steps, channels = x.shape
    taps = weight.shape[1]
    if steps == 0 or taps == 0:
        raise ValueError(f"need at least one token and one tap, got T={steps} and K={taps}")
    _expect("weight", weight, (channels, taps))
    _expect("bias", bias, (channels,))
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, taps - 1)
    _expect("initial_state", initial_state, (batch, channels, taps - 1))
    if reset is not None:
        _expect("reset", reset, (batch, steps))
        if reset.dtype != torch.bool:
            raise ValueError(f"reset must be bool, got {reset.dtype}")

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
def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One token of `causal_conv1d` for decoding: shifts x into ``state`` and returns y; not differentiable.

    Args:
        state: ``[B, D, K-1]``, the oldest input first; overwritten.
        x: ``[B, D]``.
        weight: ``[D, K]``.
        bias: ``[D]``.

    Returns:
        y ``[B, D]`` in x's dtype.

    Raises:
        ValueError: a wrong shape; the state is then unchanged.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"x must be [B, D] and weight [D, K], got {list(x.shape)} and {list(weight.shape)}")
    channels, taps = weight.shape
    _expect("x", x, (x.shape[0], channels))
    _expect("state", state, (x.shape[0], channels, taps - 1))
    _expect("bias", bias, (channels,))
    window = torch.cat([state, x.unsqueeze(-1)], dim=-1)
    state.copy_(window[..., 1:])
    if window.dtype == weight.dtype == bias.dtype == x.dtype == torch.float32:
        # The decoding loop of a tiny model is all overhead: no conversions that change nothing.
        return functional.silu(window.mul_(weight).sum(-1).add_(bias), inplace=True)
    dtype = torch.promote_types(torch.promote_types(window.dtype, weight.dtype), torch.float32)
    return functional.silu((window.to(dtype) * weight.to(dtype)).sum(-1) + bias.to(dtype)).to(x.dtype)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
