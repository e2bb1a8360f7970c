"""A list given by hand, ``score.given: [7, 8, 9, 6, 3]``: the blocks in the order in which to replace them.

For a placement known from elsewhere, such as a released model's. Blocks that are not in the list come last.
"""

from __future__ import annotations

from typing import Any

from distill.importance import Setup, assigned
from distill.importance import by_score as order

__all__ = ["NEEDS", "order", "score"]
NEEDS = ()


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its place in the list."""
    places = {block: place for place, block in enumerate(setup.config.given)}
    return assigned(setup, "given", lambda block: places.get(block, len(places)))
