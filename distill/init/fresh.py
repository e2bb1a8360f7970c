"""The mixer's own random start: the baseline that MIL is measured against."""

from __future__ import annotations

from typing import Any


def initialise(mixer: Any, attention: Any) -> None:
    """Draw the mixer's parameters anew; the attention is not looked at."""
    mixer.reset_parameters()
