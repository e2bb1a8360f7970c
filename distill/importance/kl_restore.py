"""KL-guided selection: from the student without attention, give back the attention that helps most, block by block.

Li et al., arXiv:2512.20569: the usefulness of a block's attention is by how much the KL to the teacher falls when it is
restored in a student whose other candidates are all linear; the most useful are restored first. There the student is
distilled for a while before and within each trial; here its mixers are aligned (``alignment.py``) and nothing else is
trained.
"""

from __future__ import annotations

from typing import Any

from distill.importance import Setup
from distill.importance.aligned import aligned_mixers, described, errors_of
from distill.importance.search import record_of, search

NEEDS = ("rows",)


def score(setup: Setup) -> dict[str, Any]:
    """Restore attention until ``setup.added`` candidates are left without, by which the stage's choice is made.

    The order is of all candidates: those left, by the fall that each would have brought in the last round (least
    first), then the restored ones, the first restored last. A block's score is the fall of the held-out loss by which
    it was restored, or of the last round.
    """
    aligned, mixers = aligned_mixers(setup)
    rounds = search(setup, mixers, max(len(mixers) - setup.added, 1), restore=True)
    restored = [each.chosen for each in rounds]
    last = rounds[-1]
    left = sorted(last.losses.keys() - set(restored), key=lambda block: (-last.losses[block], block))
    order = [*left, *reversed(restored)]
    fall = {block: last.before - last.losses[block] for block in left}
    fall |= {each.chosen: each.before - each.losses[each.chosen] for each in rounds}
    rows = [
        {"block": block, "score": fall[block], "rank": 1 + order.index(block), **errors_of(aligned, block)}
        for block in setup.blocks
    ]
    for row in rows:
        setup.report(int(row["block"]), row)
    return {
        "scorer": "kl_restore", **described(setup), "baseline": rounds[0].before, "rounds": record_of(rounds),
        "blocks": rows, "order": order,
    }  # fmt: skip
