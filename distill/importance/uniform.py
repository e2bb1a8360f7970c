"""Baseline: replaced blocks spread evenly over the depth. Nothing is measured.

Every stage keeps what is replaced already, so each beginning of the order has to be spread evenly: van der Corput's
sequence (1935), the places read as binary fractions with their digits reversed. Of 10 blocks half are every second one,
1, 3, 5, 7, 9.
"""

from __future__ import annotations

from typing import Any

from distill.importance import Setup, assigned
from distill.importance import by_score as order

__all__ = ["NEEDS", "order", "score"]
NEEDS = ()


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its place in the sequence, counted from the last block."""
    layers = setup.model.config.num_hidden_layers
    digits = max(layers - 1, 1).bit_length()
    return assigned(setup, "uniform", lambda block: int(f"{layers - 1 - block:0{digits}b}"[::-1], 2) / 2**digits)
