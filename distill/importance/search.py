"""Greedy search over which blocks are swapped: one block changes its side a round, the one after which the held-out
loss is least; in the next round every other is tried again beside it.

A round tries each block that has not changed yet, by shared prefixes: with n of L blocks left to try, about n L / 2
passes of one block a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from distill.importance import Setup
from distill.importance.alignment import swapped
from distill.importance.prefixes import Variation, heldout_losses


@dataclass(frozen=True)
class Round:
    """One round: the loss before it, that after changing each block that was tried, and the block that was changed."""

    before: float
    losses: Mapping[int, float]
    chosen: int


def search(setup: Setup, mixers: Mapping[int, nn.Module], count: int, *, restore: bool) -> list[Round]:
    """``count`` rounds of changing one block of ``mixers`` each: from attention to its mixer, or (``restore``), begun
    with all of them swapped, back to attention."""
    model = setup.model
    attention = {block: model.model.layers[block].self_attn for block in mixers}
    here, there = (dict(mixers), attention) if restore else (attention, mixers)
    rounds: list[Round] = []
    left: list[int] = sorted(mixers)
    now = dict(here)
    while len(rounds) < count and left:
        tried = [Variation(block, partial(swapped, model, {block: there[block]})) for block in left]
        tokens = setup.config.aligned.heldout_tokens
        before, losses = heldout_losses(setup, partial(swapped, model, now), tried, tokens=tokens)
        found = dict(zip(left, losses, strict=True))
        chosen = min(left, key=lambda block: (found[block], block))
        now[chosen] = there[chosen]
        left.remove(chosen)
        rounds.append(Round(before, found, chosen))
        what = "restored" if restore else "swapped"
        print(
            f"  round {len(rounds)}/{count}: block {chosen} {what}, loss {before:.4f} -> {found[chosen]:.4f}",
            flush=True,
        )
    return rounds


def record_of(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The rounds as JSON can hold them."""
    return [
        {"before": r.before, "chosen": r.chosen, "losses": {str(block): loss for block, loss in r.losses.items()}}
        for r in rounds
    ]
