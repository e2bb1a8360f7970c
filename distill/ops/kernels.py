"""Which implementation of an operator runs: by what is asked for, by the device, and by what is installed.

The module of an operator names its kernels in ``KERNELS``, the best first. ``auto`` is the first whose device this is
and whose package is installed. A kernel's name is asked of a whole model, so it means the best of that package,
operator by operator: where the package has no kernel for a model's scan, that is refused (the scan is what was asked
about); the short convolution beside it takes what ``auto`` would, and the log says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from distill.errors import brief, nearest

logger = logging.getLogger(__name__)

CHOICES = ("auto", "reference", "cpu", "mamba_ssm", "fla")
"""What can be asked of a whole model; an operator may have more."""
DEVICES = {"cpu": "cpu", "mamba_ssm": "cuda", "fla": "cuda"}
"""The device that a kernel needs; those that are not named are plain PyTorch and run anywhere."""
INSTALL = {
    "cpu": "pip install numba",
    "mamba_ssm": "pip install mamba-ssm causal-conv1d",
    "fla": "pip install flash-linear-attention",
}
PLAIN = (Tensor, torch.nn.Parameter)
COMPANIONS = ("causal_conv1d",)
"""Operators that only stand beside a scan: a name that has none of them leaves them to ``auto``."""


def package_of(operator: str, kernel: str) -> str:
    """The importable name of what a kernel is built on; empty for plain PyTorch."""
    if kernel == "mamba_ssm" and operator == "causal_conv1d":
        return "causal_conv1d"
    return {"cpu": "numba", "mamba_ssm": "mamba_ssm", "fla": "fla"}.get(kernel, "")


def check_kernel(operator: str, asked: str) -> None:
    """Raise ValueError where ``asked`` cannot serve an operator, be the device what it may, or lacks its package."""
    kernels: tuple[str, ...] = importlib.import_module(f"distill.ops.{operator}").KERNELS
    candidates(operator, kernels, asked, DEVICES.get(asked, "cpu"))


def candidates(operator: str, kernels: tuple[str, ...], asked: str, device: str) -> list[str]:
    """The kernels that may serve ``asked``, the best first; more than one only for ``auto``. Imports nothing.

    Raises ValueError for a name that there is not, a kernel of another device, and one whose package is not installed.
    """
    allowed = ("auto", *kernels)
    if operator in COMPANIONS and asked not in allowed and asked in CHOICES:
        asked = "auto"
    if asked not in allowed:
        what = f"'{asked}' has no kernel for {_words(operator)}" if asked in CHOICES else f"unknown kernel '{asked}'"
        raise ValueError(f"{what}{nearest(asked, allowed)}; allowed: {', '.join(allowed)}")
    fitting = [name for name in kernels if DEVICES.get(name, device) == device]
    if asked == "auto":
        return [name for name in fitting if _installed(package_of(operator, name))]
    if asked not in fitting:
        choices = ", ".join(f"'{name}'" for name in ("auto", *fitting))
        kind = {"cpu": "CPU", "cuda": "CUDA"}[DEVICES[asked]]
        raise ValueError(f"kernel '{asked}' needs {kind} tensors, got device '{device}'; use one of {choices}")
    package = package_of(operator, asked)
    if not _installed(package):
        raise ValueError(f"kernel '{asked}' needs {package}, which is not installed: {INSTALL[asked]}, or use 'auto'")
    return [asked]


@functools.cache
def kernel_of(operator: str, kernels: tuple[str, ...], asked: str, device: str) -> ModuleType:
    """The module ``distill.ops.OPERATOR_KERNEL``, imported when first used and logged once a device.

    ``kernels`` are the names that there are, the best first. With ``auto``, a package that is installed and cannot be
    imported (built for another PyTorch, most often) is passed over with a warning that says why.

    Raises ValueError as `candidates` does, and for a kernel asked for by name that cannot be imported.
    """
    names = candidates(operator, kernels, asked, device)
    for name in names:
        try:
            module = importlib.import_module(f"distill.ops.{operator}_{name}")
        except Exception as error:  # packages with compiled parts fail in errors of many kinds
            if not package_of(operator, name):
                raise
            why = f"kernel '{name}' is installed and cannot be imported ({brief(error)})"
            if asked == name:
                raise ValueError(f"{why}: build it for this PyTorch, or use 'auto'") from error
            logger.warning("%s on %s: %s; the next one is taken", _words(operator), device, why)
            continue
        # The cache around this function is what makes the line appear once.
        logger.info("%s on %s: kernel '%s' (asked for '%s')", _words(operator), device, name, asked)
        if device == "cuda" and asked == "auto" and name not in DEVICES:
            command = next(INSTALL[other] for other in kernels if DEVICES.get(other) == "cuda")
            logger.warning("%s on cuda runs in plain PyTorch, which is slow: %s", _words(operator), command)
        return module
    raise ValueError(f"no kernel of {_words(operator)} runs on device '{device}'; there are {', '.join(kernels)}")


def check_floating(**operands: Tensor) -> None:
    """Raise ValueError for an operand of whole numbers, truth values or complex numbers."""
    for name, operand in operands.items():
        if not operand.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point type, got {operand.dtype}")


def _installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def _words(operator: str) -> str:
    return operator.replace("_", " ")


@functools.cache
def has_numba() -> bool:
    """Whether the compiled kernels can be imported."""
    return importlib.util.find_spec("numba") is not None


def serves(kernels: str, *tensors: Tensor) -> bool:
    """Whether the compiled step of a whole mixer (`distill.ops.decode_cpu`) can take these, and nobody asks for another
    kernel."""
    return (
        kernels in ("auto", "cpu")
        and not torch.compiler.is_compiling()
        and all(readable(tensor) for tensor in tensors)
        and has_numba()
    )


def readable(tensor: Tensor) -> bool:
    """Whether compiled code can read ``tensor`` where it lies: contiguous float32 on CPU, there (a shard of ZeRO-3 is
    empty, an offloaded weight elsewhere), and no tensor of another class, whose numbers are another matter (quantised,
    distributed)."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype == torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )
