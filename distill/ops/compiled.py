"""Single-token operators inside ``torch.compile``: one node of the graph each, whatever kernel runs underneath.

Source: https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def update_operator(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate ``update(state, x, ...) -> y``, which overwrites ``state`` and returns a ``y`` that is like ``x``.

    A compiler takes it as the operator ``distill::NAME`` and looks no further: numba's kernels and the choice among
    kernels are not to be traced. Eagerly it stays the plain call, which costs a third of an operator's.
    """
    operator = torch.library.custom_op(f"distill::{update.__name__}", update, mutates_args=("state",))

    @operator.register_fake
    def _(state: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(x)

    @functools.wraps(update)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return operator(*args, **kwargs)
        return update(*args, **kwargs)

    return call
