"""Weights of child modules that a mixer reads without calling the child, where Accelerate keeps them elsewhere.

Under a device map with "cpu" or "disk" for a block, Accelerate brings a module's weights when that module is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
CALLED = ("in_proj", "out_proj")


def weights_at_hand(forward: Callable[..., T]) -> Callable[..., T]:
    """Decorate a mixer's forward: the weights of all its children but ``CALLED`` are brought before and sent off after.

    A mixer has parameters of its own, so that Accelerate's hook sits on it wherever one sits on its children.
    """

    @functools.wraps(forward)
    def ready(self: Any, *args: Any, **kwargs: Any) -> T:
        if "_hf_hook" not in self.__dict__:
            return forward(self, *args, **kwargs)
        children = [child for name, child in self.named_children() if name not in CALLED and hasattr(child, "_hf_hook")]
        for child in children:
            child._hf_hook.pre_forward(child)
        try:
            return forward(self, *args, **kwargs)
        finally:
            for child in children:
                child._hf_hook.post_forward(child, None)

    return ready
