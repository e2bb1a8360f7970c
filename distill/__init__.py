"""Pretrained transformers to fast hybrids: score, swap, distil, measure.

Importing the package registers the hybrid architectures with transformers' Auto classes; what ``__all__`` names comes
from ``distill.api`` when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.hybrid import model as _model  # noqa: F401

if TYPE_CHECKING:
    from distill.api import Scores, hybridize, load, package, score, train

__version__ = "0.1.0"
__all__ = ["Scores", "hybridize", "load", "package", "score", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    from distill import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
