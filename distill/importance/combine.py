"""Several scores as one: the mean of the ranks that each gives a block, ``score.combine: [loo, mmr]``.

Ranks and not scores are averaged, as scores have different units (Borda's count). Of equal means, the block that the
first of the scores puts first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from distill.importance import COMBINED, Setup, scorer
from distill.importance.checks import check_rows

RANK = "rank_"


def ordered(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks by their mean rank, then by the first score's."""
    firsts = [key for key in rows[0] if key.startswith(RANK)][:1]
    found = sorted(rows, key=lambda row: (row["score"], *(row[key] for key in firsts), row["block"]))
    return [int(row["block"]) for row in found]


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by all of ``score.combine``, and by its mean rank (1: the least important)."""
    parts = {name: scorer(name)(setup) for name in setup.config.combine}
    for name, part in parts.items():
        check_rows(f"{COMBINED}: {name}", part["blocks"], setup.added)
    ranks = {name: {block: 1 + place for place, block in enumerate(part["order"])} for name, part in parts.items()}
    rows = []
    for block in setup.blocks:
        found = {f"{RANK}{name}": float(rank[block]) for name, rank in ranks.items()}
        row = {"block": block, "score": mean(found.values()), **found}
        rows.append(row)
        setup.report(block, row)
    return {"scorer": COMBINED, "parts": parts, "blocks": rows, "order": ordered(rows)}
