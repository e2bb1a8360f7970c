"""What the rows of any importance score have to be; otherwise a ranking would be arbitrary, and nothing is swapped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from distill.errors import UserError

DECIDE = ("score", "loglikelihood")
"""What the order of blocks may follow from."""


def check_rows(name: str, rows: Sequence[Mapping[str, float]], added: int = 1) -> None:
    """Raise UserError where no order follows from the ``rows`` of the score ``name``, of which ``added`` blocks are to
    be taken: a figure that decides is not finite, there are fewer rows than that, or no row differs from another."""
    for row in rows:
        check_finite(name, row)
    check_enough(name, [int(row["block"]) for row in rows], added)
    found = {tuple(row.get(key, 0.0) for key in DECIDE) for row in rows}
    if len(found) == 1 and len(rows) > added:
        raise UserError(
            f"{name}: all {len(rows)} blocks have the same score, {rows[0]['score']:g}, so that their ranking would be "
            "arbitrary: nothing is swapped. Take another metric, more questions or more steps, or another score"
        )


def check_finite(name: str, row: Mapping[str, float]) -> None:
    """Raise UserError where a figure of a row that decides is not finite."""
    for key in DECIDE:
        if key in row and not math.isfinite(row[key]):
            raise UserError(
                f"{name}: block {row['block']} has {key} {row[key]}, so that its rank would be arbitrary: nothing is "
                "swapped. A loss that is not finite comes of a learning rate that is too high, a metric of questions "
                "that it cannot score"
            )


def check_enough(name: str, blocks: Sequence[int], added: int) -> None:
    """Raise UserError where there are fewer candidates than blocks to replace."""
    if len(blocks) < added:
        raise UserError(
            f"{name}: {added} blocks are to be replaced, and there are {len(blocks)} candidates ({list(blocks)}): "
            "name more of them in score.blocks, or lower h in schedule"
        )
