"""Operators inside ``torch.compile``: a scan breaks the graph, a single-token update is one node of it.

Source: https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def untraced(scan: Callable[..., T]) -> Callable[..., T]:
    """Decorate what a compiler is to call as it is, with a break of the graph, and not to look into."""
    called: Callable[..., T] = torch.compiler.disable(scan)
    return called


def update_operator(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate ``update(state, x, ...) -> y``, which overwrites ``state`` and returns a ``y`` that is like ``x``.

    A compiler takes it as the operator ``distill::NAME`` and looks no further: numba's kernels and the choice among
    kernels are not to be traced. Eagerly it stays the plain call, which costs a third of an operator's.
    """
    # The choice of kernel goes under another name: inductor has a "kernel" argument of its own.
    schema = "(Tensor(a!) state, Tensor[] inputs, str? asked=None) -> Tensor"

    def run(state: Tensor, inputs: list[Tensor], asked: str | None = None) -> Tensor:
        return update(state, *inputs, **({} if asked is None else {"kernel": asked}))

    operator = torch.library.custom_op(f"distill::{update.__name__}", run, mutates_args=("state",), schema=schema)
    operator.register_fake(lambda state, inputs, asked=None: torch.empty_like(inputs[0]))

    def traced(state: Tensor, *inputs: Tensor, kernel: str | None = None) -> Tensor:
        return operator(state, list(inputs), kernel)

    @functools.wraps(update)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return traced(*args, **kwargs) if torch.compiler.is_compiling() else update(*args, **kwargs)

    return call
