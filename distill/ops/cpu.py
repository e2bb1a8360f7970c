"""What kernels on CPU share: compilation by numba (no compiler needed), an exp that vectorises, threads.

Threads (`torch.get_num_threads()` of them: one knob for PyTorch and the kernels) are PyTorch's own where they can be
had (`distill.ops.openmp`), around kernels that release the GIL: safe to call from several threads, and quicker to
compile than prange.
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from distill.ops import openmp

SERIAL_WORK = 1 << 14  # numbers of state below which waking threads costs more than it saves

# No nnan/ninf: a NaN that comes in has to come out. reassoc is what lets sums over N vectorise.
Kernel = Callable[..., None]

_FAST_SUMS = {"contract", "reassoc", "nsz"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST_SUMS}
    try:
        compiled: Callable[..., Any] = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package folder nor the user's cache folder is writable
        compiled = njit(**options)(function)
    return compiled


_f = np.float32  # typed constants: a Python float would widen the whole expression to float64
_ZERO, _ONE = _f(0), _f(1)
_LOWEST, _HIGHEST = _f(-87.33), _f(89)  # below: 0 (no subnormals); above: inf
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of the mantissa
_P0, _P1, _P2 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_P3, _P4, _P5 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)


def exp(value):
    """exp inside kernels: a branch-free float32 polynomial (relative error 1e-7), math.exp for float64."""
    return math.exp(value)


# contract only: reassociation would fold the rounding trick and the two-part ln 2 away.
@overload(exp, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _overload_exp(value):
    if value != types.float32:
        return lambda value: math.exp(value)

    def exp32(value):
        # Cephes: exp(v) = 2^k exp(r), k = round(v / ln 2), |r| <= ln(2) / 2. 2^k is built from its bits.
        v = _HIGHEST if value > _HIGHEST else value
        shifted = v * _LOG2E + _ROUND
        k = shifted - _ROUND
        r = v - k * _LN2_HIGH
        r = r - k * _LN2_LOW
        p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        p = p * (r * r) + r + _ONE
        bits = np.int32((np.float32(shifted).view(np.int32) << 23) + 0x3F800000)
        return _ZERO if value < _LOWEST else p * np.int32(bits).view(np.float32)

    return exp32


_S1, _S2, _S3, _S4 = _f(1 / 3), _f(1 / 5), _f(1 / 7), _f(1 / 9)
_S5, _S6, _S7 = _f(1 / 11), _f(1 / 13), _f(1 / 15)
_TWO = _f(2)


@jit
def softplus(value):
    """log(1 + exp(value)) in float32, branch-free too: exp(-|v|) = t, log(1 + t) = 2 artanh(t / (2 + t)), a series in
    at most 1/9 (relative error 3e-7)."""
    t = exp(-abs(value))
    s = t / (_TWO + t)
    q = s * s
    p = ((((((_S7 * q + _S6) * q + _S5) * q + _S4) * q + _S3) * q + _S2) * q + _S1) * q + _ONE
    return max(value, _ZERO) + _TWO * s * p


def array(tensor: Tensor, dtype: torch.dtype) -> Any:
    """A C-contiguous numpy view of ``tensor``; a copy only where dtype or layout differ."""
    # Asking first costs a tenth of a call that changes nothing, and decoding pays for it once a layer and token.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous().numpy()


@functools.cache
def width_of(states: int) -> tuple[int, ...]:
    return (0,) * states


def spread(team: Kernel, tasks: int, work: int, *arguments: Any) -> None:
    """Run a kernel over all tasks, on several threads where the work is worth it.

    ``team`` is the compiled function beside every kernel that calls ``openmp.parallel`` with it (which needs its name).
    Where PyTorch's threads cannot be had, it is some of our own.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1 or work < SERIAL_WORK:
        team(0, 1, (0, tasks), 1, arguments)
        return
    # More pieces than threads, and a busy core holds up less; but neighbours together, and memory is read in order.
    pieces = max(threads, min(4 * threads, tasks // 8))
    if (address := openmp.team()) is not None:
        team(address, threads, (0, tasks), pieces, arguments)
        return
    edges = itertools.pairwise([tasks * piece // pieces for piece in range(pieces + 1)])

    def take() -> None:
        for edge in edges:  # shared: whoever is free takes the next
            team(0, 1, edge, 1, arguments)

    jobs = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    take()
    for job in jobs:
        job.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool but not its threads
