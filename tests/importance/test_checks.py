"""Rows from which no order follows: named and refused, whichever score they come from."""

from __future__ import annotations

import math

import pytest

from distill.errors import UserError
from distill.importance.checks import check_enough, check_rows


def rows(*scores: float, **more: float) -> list[dict[str, float]]:
    return [{"block": block, "score": score, **more} for block, score in enumerate(scores)]


def test_rows_that_can_be_ordered_pass() -> None:
    check_rows("mmr", rows(0.1, 0.2, 0.1), added=2)
    check_rows("mmr", rows(0.1))
    check_rows("mmr", rows(0.1, 0.1), added=2)  # all of them are taken
    alike = [{**row, "loglikelihood": -float(row["block"])} for row in rows(0.1, 0.1, 0.1)]
    check_rows("loo", alike)  # the likelihood decides


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["score", "loglikelihood"])
def test_a_figure_that_is_not_finite_is_named(key: str, value: float) -> None:
    bad = rows(0.1, 0.2, 0.3, loglikelihood=-1.0)
    bad[1][key] = value
    with pytest.raises(UserError, match=f"loo: block 1 has {key} {value}, so that its rank would be arbitrary"):
        check_rows("loo", bad)


def test_a_constant_is_refused() -> None:
    with pytest.raises(UserError, match="mmr: all 3 blocks have the same score, 0.5, .*arbitrary: nothing is swapped"):
        check_rows("mmr", rows(0.5, 0.5, 0.5), added=2)
    with pytest.raises(UserError, match="loo: all 2 blocks have the same score"):
        check_rows("loo", rows(0.5, 0.5, loglikelihood=-1.0))


def test_too_few_candidates() -> None:
    with pytest.raises(UserError, match=r"loo: 3 blocks are to be replaced, and there are 2 candidates \(\[4, 7\]\)"):
        check_enough("loo", [4, 7], 3)
    with pytest.raises(UserError, match="3 blocks are to be replaced, and there are 2 candidates"):
        check_rows("loo", rows(0.1, 0.2), added=3)
