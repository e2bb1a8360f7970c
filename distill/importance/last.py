"""Baseline: the last blocks first, as depth alone would have it. Nothing is measured."""

from __future__ import annotations

from typing import Any

from distill.importance import Setup, assigned
from distill.importance import by_score as order

__all__ = ["NEEDS", "order", "score"]
NEEDS = ()


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its distance from the end."""
    layers = setup.model.config.num_hidden_layers
    return assigned(setup, "last", lambda block: layers - 1 - block)
