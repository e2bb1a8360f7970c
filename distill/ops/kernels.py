"""Which implementation of an operator runs: by what is asked for, by the device, and by what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from distill.errors import nearest

logger = logging.getLogger(__name__)


@functools.cache
def kernel_of(operator: str, kernels: tuple[str, ...], asked: str, device: str) -> ModuleType:
    """The module ``distill.ops.OPERATOR_KERNEL``, imported when first used and logged once a device.

    ``kernels`` are the names that there are; ``auto`` is ``cpu`` for CPU tensors where numba is installed, otherwise
    the first of the others.

    Raises ValueError for a name that there is not, and for ``cpu`` elsewhere.
    """
    allowed = ("auto", *kernels)
    if asked not in allowed:
        raise ValueError(f"unknown kernel '{asked}'{nearest(asked, allowed)}; allowed: {', '.join(allowed)}")
    others = [name for name in kernels if name != "cpu"]
    if asked == "cpu" and device != "cpu":
        choices = ", ".join(f"'{name}'" for name in ("auto", *others))
        raise ValueError(f"kernel 'cpu' needs CPU tensors, got device '{device}'; use one of {choices}")
    name = asked
    if asked == "auto":
        name = "cpu" if device == "cpu" and has_numba() else others[0]
    # The cache around this function is what makes the line appear once.
    logger.info("%s on %s: kernel '%s' (asked for '%s')", operator.replace("_", " "), device, name, asked)
    return importlib.import_module(f"distill.ops.{operator}_{name}")


@functools.cache
def has_numba() -> bool:
    """Whether the compiled kernels can be imported."""
    return importlib.util.find_spec("numba") is not None


def serves(kernels: str, *tensors: Tensor) -> bool:
    """Whether the compiled step of a whole mixer (`distill.ops.decode_cpu`) can take these: contiguous float32 on CPU,
    and no other kernel asked for."""
    return (
        kernels in ("auto", "cpu")
        and not torch.compiler.is_compiling()
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and has_numba()
    )
