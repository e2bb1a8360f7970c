"""Greedy: swap the block that costs least, score the others again beside it, and so on.

Scores of single blocks miss that two blocks may do the same work: each can go, but not both. Here every block after the
first is scored in a model that has lost those before it already, which is what re-estimating before every stage is for,
without a training between. Costs are held-out losses with aligned mixers (``aligned.py``).
"""

from __future__ import annotations

from typing import Any

from distill.importance import Setup
from distill.importance.aligned import aligned_mixers, described, errors_of
from distill.importance.search import record_of, search

NEEDS = ("rows",)


def score(setup: Setup) -> dict[str, Any]:
    """Choose ``setup.added`` blocks one by one; the others follow by what each would have cost in the last round.

    A block's score is the held-out loss once it is swapped beside those before it.
    """
    aligned, mixers = aligned_mixers(setup)
    rounds = search(setup, mixers, min(setup.added, len(mixers)), restore=False)
    chosen = [each.chosen for each in rounds]
    last = rounds[-1].losses
    order = [*chosen, *sorted(last.keys() - set(chosen), key=lambda block: (last[block], block))]
    cost = {**last, **{each.chosen: each.losses[each.chosen] for each in rounds}}
    rows = [
        {"block": block, "score": cost[block], "rank": 1 + order.index(block), **errors_of(aligned, block)}
        for block in setup.blocks
    ]
    for row in rows:
        setup.report(int(row["block"]), row)
    return {
        "scorer": "greedy", **described(setup), "baseline": rounds[0].before, "rounds": record_of(rounds),
        "blocks": rows, "order": order,
    }  # fmt: skip
