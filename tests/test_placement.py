"""Names, placements and the order in which blocks are replaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.placement import ATTENTION, hybrid_name, parse_name, replace, replaced_blocks

APRIEL_25 = [*range(20, 26), 27, *range(30, 34), *range(35, 48), 49]  # released, 0-based


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_name_is_read_as_it_was_written(replaced: int, blocks: int) -> None:
    assert parse_name(hybrid_name(replaced, blocks)) == (replaced, blocks)
    assert parse_name(f"h1-{replaced}") == (replaced, None)


def test_the_papers_name() -> None:
    assert hybrid_name(25, 50) == "H1-25/50"


@pytest.mark.parametrize("name", ["", "H1", "H1-", "H2-5", "H1-5/", "H1--5", "H1-5/10/2", "H1-five", " H1-5", "H1-5\n"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no hybrid name; expected H1-h or H1-h/L"):
        parse_name(name)


def test_the_released_placements() -> None:
    """Apriel-H1-25, then 27 and 30, each on top of the one before."""
    teacher = [ATTENTION] * 50
    first = replace(teacher, APRIEL_25, "mamba1")
    second = replace(first, [3, 5], "mamba1")
    third = replace(second, [6, 7, 8], "mamba1")
    assert [len(replaced_blocks(m)) for m in (teacher, first, second, third)] == [0, 25, 27, 30]
    assert replaced_blocks(first) == APRIEL_25
    assert replaced_blocks(third) == sorted([*APRIEL_25, 3, 5, 6, 7, 8])
    assert teacher == [ATTENTION] * 50, "the placement that was given is left alone"


def test_other_mixers_stay() -> None:
    assert replace(["mamba2", ATTENTION, ATTENTION], [2], "mamba1") == ["mamba2", ATTENTION, "mamba1"]


@pytest.mark.parametrize("block", [-1, 3, 100])
def test_a_block_out_of_range_is_refused(block: int) -> None:
    with pytest.raises(UserError, match=rf"block {block} is out of range; expected a value in \[0, 3\)"):
        replace([ATTENTION] * 3, [block], "mamba1")


@pytest.mark.parametrize("blocks", [[1], [0, 0]])
def test_a_block_is_replaced_once(blocks: list[int]) -> None:
    with pytest.raises(UserError, match="already has mixer 'mamba"):
        replace([ATTENTION, "mamba2"], blocks, "mamba1")
