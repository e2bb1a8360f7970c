"""Selective scan with grouped B and C: the recurrence of the `mamba1` mixer, and the choice of its kernel.

Source: Mamba (arXiv:2312.00752, eq. 2, with B_bar = dt B as in its released code) in the M1 form that
Apriel-H1 uses (eq. 1-2), where D/G neighbouring channels share one B and one C vector.

    B = batch, T = tokens, D = channels, N = states per channel, G = groups of B and C
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.ops.compiled import untraced, update_operator
from distill.ops.kernels import check_floating, kernel_of

KERNELS = ("cpu", "mamba_ssm", "reference")


@untraced
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`` and read ``y_t = C_t . h_t + D x_t``.

    Differentiable in every floating-point argument. Half types are computed in float32; float64, if any of
    the six operands has it, in float64. On CPU, results are the same bits from run to run and for any thread count.

    Args:
        x: inputs ``[B, T, D]``.
        dt: step sizes ``[B, T, D]``, positive (after the softplus).
        A: decay rates ``[D, N]``, negative.
        B, C: input and output vectors ``[B, T, G, N]``, D % G == 0; channel d is in group ``d // (D // G)``.
        D: skip weights ``[D]``.
        reset: ``[B, T]`` bool; where True, a document starts: the state is zeroed before this token.
        initial_state: state before the first token ``[B, D, N]`` (zero if None; dropped by a reset at t = 0).
        kernel: ``auto`` (the first of these that the device and what is installed allow), ``cpu``, ``mamba_ssm``
            (CUDA) or ``reference``.

    Returns:
        y ``[B, T, D]`` in x's dtype, and the final state ``[B, D, N]`` in float32 (float64 if computed so),
        detached: no gradient flows through a carried state into the chunk before.

    Raises:
        ValueError: a wrong shape, dtype or kernel; raised before any work.
    """
    chosen = kernel_of("selective_scan", KERNELS, kernel, x.device.type)
    _check_scan(x, dt, A, B, C, D, reset, initial_state)
    y, final_state = chosen.scan(x, dt, A, B, C, D, reset, initial_state)
    return y, final_state


@update_operator
def selective_scan_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    kernel: str = "auto",
) -> Tensor:
    """One token of `selective_scan` for decoding: overwrites ``state`` and returns y; not differentiable.

    Args:
        state: ``[B, D, N]``, float32 (or float64) and contiguous; computed in its dtype.
        x, dt: ``[B, D]``.
        A: ``[D, N]``.
        B, C: ``[B, G, N]``.
        D: ``[D]``.
        kernel: as in `selective_scan`.

    Returns:
        y ``[B, D]`` in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or kernel; the state is then unchanged.
    """
    chosen = kernel_of("selective_scan", KERNELS, kernel, x.device.type)
    if state.ndim != 3 or B.ndim != 3:
        raise ValueError(f"state must be [B, D, N] and B [B, G, N], got {_dims(state)} and {_dims(B)}")
    batch, channels, states = state.shape
    grouped = (batch, B.shape[1], states)
    _expect("x", x, (batch, channels))
    _expect("dt", dt, (batch, channels))
    _expect("A", A, (channels, states))
    _expect("B", B, grouped)
    _expect("C", C, grouped)
    _expect("D", D, (channels,))
    _check_groups(channels, grouped[1])
    if state.dtype not in (torch.float32, torch.float64) or not state.is_contiguous():
        raise ValueError(
            "state must be contiguous float32 or float64 to be updated in place, "
            f"got {state.dtype} with strides {state.stride()}"
        )
    y: Tensor = chosen.update(state, x, dt, A, B, C, D)
    return y


def _check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check_floating(x=x, dt=dt, A=A, B=B, C=C, D=D)
    if x.ndim != 3 or A.ndim != 2 or B.ndim != 4:
        got = f"{_dims(x)}, {_dims(A)} and {_dims(B)}"
        raise ValueError(f"x must be [B, T, D], A [D, N] and B [B, T, G, N], got {got}")
    batch, steps, channels = x.shape
    if steps == 0:
        raise ValueError(f"x must hold at least one token, got {_dims(x)}")
    grouped = (batch, steps, B.shape[2], A.shape[1])
    _expect("dt", dt, (batch, steps, channels))
    _expect("A", A, (channels, A.shape[1]))
    _expect("B", B, grouped)
    _expect("C", C, grouped)
    _expect("D", D, (channels,))
    _check_groups(channels, grouped[2])
    if initial_state is not None:
        _expect("initial_state", initial_state, (batch, channels, A.shape[1]))
    if reset is not None:
        _expect("reset", reset, (batch, steps))
        if reset.dtype != torch.bool:
            raise ValueError(f"reset must be bool, got {reset.dtype}")


def _check_groups(channels: int, groups: int) -> None:
    if groups == 0 or channels % groups:
        raise ValueError(f"the number of channels D={channels} must be a multiple of the groups G={groups}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_dims(tensor)}")


def _dims(tensor: Tensor) -> str:
    return str(list(tensor.shape))
