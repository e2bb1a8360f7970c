"""Baseline: the first blocks first. Nothing is measured."""

from __future__ import annotations

from typing import Any

from distill.importance import Setup, assigned
from distill.importance import by_score as order

__all__ = ["NEEDS", "order", "score"]
NEEDS = ()


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its place."""
    return assigned(setup, "first", lambda block: block)
