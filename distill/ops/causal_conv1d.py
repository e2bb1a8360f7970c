"""Depthwise causal convolution over time with SiLU, document starts and a carried state, and the choice of its kernel.

The short convolution before the scan in Mamba (arXiv:2312.00752, section 3.4); ``weight[:, K-1]`` meets the
current token, as in ``torch.nn.Conv1d`` with left padding.

    B = batch, T = tokens, D = channels, K = taps
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.ops.compiled import untraced, update_operator
from distill.ops.kernels import check_floating, kernel_of

KERNELS = ("cpu", "mamba_ssm", "reference")


@untraced
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``y_t = silu(bias + sum_k weight[:, K-1-k] x_{t-k})``, summed over the tokens of t's document only.

    Differentiable in x, weight, bias and initial_state; half types are summed in float32. Results are the same bits
    from run to run and for any thread count.

    Args:
        x: inputs ``[B, T, D]``.
        weight: taps ``[D, K]``, the oldest first.
        bias: ``[D]``.
        reset: ``[B, T]`` bool; True where a document starts: no tap reaches behind that token.
        initial_state: the K-1 inputs before ``x``, ``[B, D, K-1]``, the oldest first (zeros if None).
        kernel: ``auto`` (the first of these that the device and what is installed allow), ``cpu``, ``mamba_ssm``
            (CUDA; its companion package causal-conv1d) or ``reference``.

    Returns:
        y ``[B, T, D]`` in x's dtype, and the final state ``[B, D, K-1]`` in x's dtype, detached: the last K-1
        inputs of the current document, zero where it is shorter.

    Raises:
        ValueError: a wrong shape, dtype or kernel, before any work.
    """
    chosen = kernel_of("causal_conv1d", KERNELS, kernel, x.device.type)
    check_floating(x=x, weight=weight, bias=bias)
    if x.ndim != 3 or weight.ndim != 2:
        given = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"x must be [B, T, D] and weight [D, K], got {given}")
    batch, steps, channels = x.shape
    taps = weight.shape[1]
    if steps == 0 or taps == 0:
        raise ValueError(f"need at least one token and one tap, got T={steps} and K={taps}")
    _expect("weight", weight, (channels, taps))
    _expect("bias", bias, (channels,))
    if initial_state is not None:
        _expect("initial_state", initial_state, (batch, channels, taps - 1))
    if reset is not None:
        _expect("reset", reset, (batch, steps))
        if reset.dtype != torch.bool:
            raise ValueError(f"reset must be bool, got {reset.dtype}")
    y, state = chosen.conv(x, weight, bias, reset, initial_state)
    return y, state


@update_operator
def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, kernel: str = "auto") -> Tensor:
    """One token of `causal_conv1d` for decoding: shifts x into ``state`` and returns y; not differentiable.

    Args:
        state: ``[B, D, K-1]``, the oldest input first; overwritten.
        x: ``[B, D]``.
        weight: ``[D, K]``.
        bias: ``[D]``.
        kernel: as in `causal_conv1d`.

    Returns:
        y ``[B, D]`` in x's dtype.

    Raises:
        ValueError: a wrong shape or kernel; the state is then unchanged.
    """
    chosen = kernel_of("causal_conv1d", KERNELS, kernel, x.device.type)
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"x must be [B, D] and weight [D, K], got {list(x.shape)} and {list(weight.shape)}")
    channels, taps = weight.shape
    _expect("x", x, (x.shape[0], channels))
    _expect("state", state, (x.shape[0], channels, taps - 1))
    _expect("bias", bias, (channels,))
    y: Tensor = chosen.update(state, x, weight, bias)
    return y


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
