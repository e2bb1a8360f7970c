"""Baseline: blocks in random order, by the run's seed. Nothing is measured."""

from __future__ import annotations

from random import Random
from typing import Any

from distill.importance import Setup, assigned
from distill.importance import by_score as order

__all__ = ["NEEDS", "order", "score"]
NEEDS = ()


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by a number drawn for (seed, block), whichever other candidates there are."""
    return assigned(setup, "random", lambda block: Random(f"{setup.seed}/{block}").random())
