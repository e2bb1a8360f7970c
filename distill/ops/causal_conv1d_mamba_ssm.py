"""The causal convolution with SiLU by the CUDA kernels of the causal-conv1d package (written against 1.7.0).

The package stands beside mamba-ssm and is asked for under that name. It takes 2 to 4 taps, one type for x and its
states (float32 or half), and for documents and states only the layout in which the channels of a token lie side by
side, in steps of 8 channels. What does not fit runs in plain PyTorch, call by call.

    B = batch, T = tokens, D = channels, K = taps
"""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn
from causal_conv1d import causal_conv1d_update as causal_conv1d_step
from torch import Tensor

from distill.ops import causal_conv1d_reference as reference

ALIGNED = 8  # channels that the kernels read at once
BYTES = 16  # and the address that such a read begins at is a multiple of this


def conv(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`distill.ops.causal_conv1d.causal_conv1d` on tensors that have been checked; shapes as there."""
    if not _fits(x, weight) or x.shape[2] % ALIGNED:
        return reference.conv(x, weight, bias, reset, initial_state)
    state = initial_state
    if state is not None:
        state = state.to(x.dtype)
        if reset is not None:  # the package would let the first document of a row see it
            state = state.masked_fill(reset[:, 0, None, None], 0)
    y = causal_conv1d_fn(
        _aligned(x).transpose(1, 2),
        weight,
        bias.to(weight.dtype),
        seq_idx=None if reset is None else reset.cumsum(1, dtype=torch.int32),
        initial_states=None if state is None else _channels_last(state),
        activation="silu",
    ).transpose(1, 2)
    if y.requires_grad:
        y.register_hook(_aligned)  # the backward reads its gradient as the forward reads x
    return y, _final_state(x, weight.shape[1] - 1, reset, state)


@torch.no_grad()
def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`distill.ops.causal_conv1d.causal_conv1d_update` on tensors that have been checked; shapes as there."""
    if not _fits(x, weight) or state.dtype != x.dtype:
        return reference.update(state, x, weight, bias)
    y: Tensor = causal_conv1d_step(x, state, weight, bias.to(weight.dtype), activation="silu")
    return y


def _fits(x: Tensor, weight: Tensor) -> bool:
    return 2 <= weight.shape[1] <= 4 and torch.float64 not in (x.dtype, weight.dtype)


def _aligned(x: Tensor) -> Tensor:
    """``x [B, T, D]`` with the channels of a token side by side, at strides and an address that the kernels can read.

    A slice of a wider projection is taken as it is where it can be. Strides of dimensions of length 1 count as well,
    and ``contiguous`` leaves those as they are.
    """
    fits = x.stride(2) == 1 and not any(stride % ALIGNED for stride in x.stride()[:2]) and x.stride(1) > 1
    fits = fits and x.storage_offset() * x.element_size() % BYTES == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _channels_last(state: Tensor) -> Tensor:
    """``[B, D, K-1]`` with neighbouring channels side by side."""
    return state.transpose(1, 2).contiguous().transpose(1, 2)


def _final_state(x: Tensor, length: int, reset: Tensor | None, state: Tensor | None) -> Tensor:
    """The last ``length`` inputs ``[B, D, length]``, detached, zero where they are of a document before the last."""
    with torch.no_grad():
        batch, steps, channels = x.shape
        tail = x[:, max(steps - length, 0) :]
        if steps < length:
            old = x.new_zeros(batch, length - steps, channels) if state is None else state[:, :, steps:].transpose(1, 2)
            tail = torch.cat([old, tail], dim=1)
        if reset is not None:
            since = reset.new_zeros(batch, length + 1)
            since[:, max(length - steps, 0) : -1] = reset[:, max(steps - length, 0) :]
            later = since[:, 1:].flip(1).cummax(1).values.flip(1)  # a document starts after this input
            tail = tail.masked_fill(later[..., None], 0)
        return tail.transpose(1, 2).clone(memory_format=torch.contiguous_format)
