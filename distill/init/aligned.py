"""Aligned: MIL, from where the mixer is then regressed to the outputs of the attention that it replaces.

The regression takes data and a model, which an initialisation by itself has not: ``distill.importance.alignment`` does
it, for the step that swaps.
"""

from __future__ import annotations

from distill.init.mil import initialise

__all__ = ["initialise"]
