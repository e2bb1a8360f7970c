"""State space duality: the scan of the `mamba2` mixer, its step for decoding, and the choice of their kernels.

Source: Mamba-2 (arXiv:2405.21060): a decay a head and token in place of one a channel and state, which lets the scan be
written in matrix products.

    B = batch, T = tokens, H = heads, P = channels a head, N = states a channel, G = groups of B and C
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.ops.compiled import untraced, update_operator
from distill.ops.kernels import check_floating, kernel_of

KERNELS = ("cpu", "mamba_ssm", "fla", "chunked", "reference")


@untraced
def ssd(
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
    """Scan ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`` and read ``y_t = h_t C_t + D x_t``, head by head.

    Differentiable in every floating-point argument. Half types are computed in float32; float64, if any operand has
    it, in float64. A document's outputs and gradients do not depend on the others of its row by a single bit.

    Args:
        x: inputs ``[B, T, H, P]``.
        dt: step sizes ``[B, T, H]``, positive (after the softplus).
        A: decay rates ``[H]``, negative.
        B, C: input and output vectors ``[B, T, G, N]``; head h is in group ``h // (H // G)``.
        D: skip weights ``[H]``.
        reset: ``[B, T]`` bool; where True, a document starts: the state is zeroed before this token.
        initial_state: state before the first token ``[B, H, P, N]`` (zero if None; dropped by a reset at t = 0).
        kernel: ``auto`` (the first of these that the device and what is installed allow), ``cpu``, ``mamba_ssm`` or
            ``fla`` (CUDA), ``chunked`` or ``reference``.

    Returns:
        y ``[B, T, H, P]`` in x's dtype, and the final state ``[B, H, P, N]`` in float32 (float64 if computed so),
        detached: no gradient flows through a carried state into the tokens before.

    Raises:
        ValueError: a wrong shape, dtype or kernel; raised before any work.
    """
    chosen = kernel_of("ssd", KERNELS, kernel, x.device.type)
    _check(x, dt, A, B, C, D, reset, initial_state)
    y, final_state = chosen.scan(x, dt, A, B, C, D, reset, initial_state)
    return y, final_state


@update_operator
def ssd_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, kernel: str = "auto"
) -> Tensor:
    """One token of `ssd` for decoding: overwrites ``state`` and returns y; not differentiable.

    Args:
        state: ``[B, H, P, N]``, float32 (or float64) and contiguous; computed in its dtype.
        x: ``[B, H, P]``. dt: ``[B, H]``. A, D: ``[H]``. B, C: ``[B, G, N]``.
        kernel: as in `ssd`.

    Returns:
        y ``[B, H, P]`` in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or kernel; the state is then unchanged.
    """
    chosen = kernel_of("ssd", KERNELS, kernel, x.device.type)
    if x.ndim != 3 or B.ndim != 3 or state.ndim != 4:
        raise ValueError(f"x must be [B, H, P], got {list(x.shape)}; B [B, G, N], got {list(B.shape)}")
    _check(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None, state)
    if state.dtype not in (torch.float32, torch.float64) or not state.is_contiguous():
        raise ValueError(
            "state must be contiguous float32 or float64 to be updated in place, "
            f"got {state.dtype} with strides {state.stride()}"
        )
    y: Tensor = chosen.update(state, x, dt, A, B, C, D)
    return y


def _check(
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
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"x must be [B, T, H, P] and B [B, T, G, N], got {list(x.shape)} and {list(B.shape)}")
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    if length == 0:
        raise ValueError(f"x must hold at least one token, got {list(x.shape)}")
    if groups == 0 or heads % groups:
        raise ValueError(f"the number of heads H={heads} must be a multiple of the groups G={groups}")
    wanted = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, states)),
        "C": (C, (batch, length, groups, states)),
        "D": (D, (heads,)),
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, heads, width, states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be bool, got {reset.dtype}")
