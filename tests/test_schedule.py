"""The stage schedule: the paper's, scaled to other depths, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import DataConfig, RunConfig, ScoreConfig, TrainConfig
from distill.errors import UserError
from distill.schedule import PAPER_BLOCKS, PAPER_SCHEDULE, build_schedule, scaled


def test_the_paper() -> None:
    stages = build_schedule(RunConfig(), 50)
    assert [stage.replaced for stage in stages] == [25, 27, 30, 34, 37, 40]
    assert [stage.added for stage in stages] == [25, 2, 3, 4, 3, 3]
    assert [stage.scorer for stage in stages] == ["loo", *["mmr"] * 5]
    assert [stage.name for stage in stages][:2] == ["H1-25/50", "H1-27/50"]
    assert [stage.folder for stage in stages][:2] == ["01-H1-25", "02-H1-27"]
    assert [stage.index for stage in stages] == list(range(6))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (100, [50, 54, 60, 68, 74, 80]),
        (32, [16, 17, 19, 22, 24, 26]),
        (10, [5, 6, 7, 8]),  # 5.4 and 5; 6.8 and 7.4
        (8, [4, 5, 6]),
        (4, [2, 3]),
        (2, [1]),
    ],
)
def test_scaled_to_another_depth(blocks: int, expected: list[int]) -> None:
    assert scaled(PAPER_SCHEDULE, PAPER_BLOCKS, blocks) == expected
    assert [stage.replaced for stage in build_schedule(RunConfig(), blocks)] == expected


@given(st.integers(2, 200))
def test_a_scaled_schedule_increases_and_leaves_attention(blocks: int) -> None:
    schedule = scaled(PAPER_SCHEDULE, PAPER_BLOCKS, blocks)
    assert schedule
    assert all(a < b for a, b in pairwise(schedule))
    assert schedule[0] > 0 and schedule[-1] < blocks
    for h in schedule:
        assert min(abs(h - paper * blocks / 50) for paper in PAPER_SCHEDULE) <= 0.5
    stages = build_schedule(RunConfig(), blocks)
    assert sum(stage.added for stage in stages) == schedule[-1]
    assert all(stage.added > 0 for stage in stages)


def test_budgets() -> None:
    config = RunConfig(
        schedule=[5, 7, 8],
        train=TrainConfig(steps=100, batch_size=16),
        data=DataConfig(sequence_length=128),
        score=ScoreConfig(first="mmr", later="loo"),
    )
    stages = build_schedule(config, 10)
    assert [stage.steps for stage in stages] == [100, 100, 100]
    assert [stage.tokens for stage in stages] == [100 * 16 * 128] * 3
    assert [stage.scorer for stage in stages] == ["mmr", "loo", "loo"]
    config.train.steps_by_stage = [10, 20, 30]
    stages = build_schedule(config, 10)
    assert [stage.steps for stage in stages] == [10, 20, 30]
    assert [stage.tokens for stage in stages] == [10 * 2048, 20 * 2048, 30 * 2048]


def test_accumulation_does_not_add_tokens() -> None:
    """``batch_size`` counts the rows of a step over all accumulation steps."""
    one, four = (
        build_schedule(RunConfig(schedule=[1], train=TrainConfig(batch_size=8, gradient_accumulation=n)), 4)
        for n in (1, 4)
    )
    assert one[0].tokens == four[0].tokens


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([5, 5], "5 follows 5"),
        ([5, 3], "3 follows 5"),
        ([0], "from at least 1; 0 follows 0"),
        ([-2, 3], "-2 follows 0"),
        ([5, 10], "10 is not below the teacher's 10 blocks"),
        ([11], "11 is not below the teacher's 10 blocks"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_schedule(RunConfig(schedule=schedule), 10)
    assert f"schedule={schedule}" in str(caught.value)


@pytest.mark.parametrize("steps", [[1], [1, 2, 3]])
def test_one_budget_a_stage(steps: list[int]) -> None:
    config = RunConfig(schedule=[5, 7], train=TrainConfig(steps_by_stage=steps))
    with pytest.raises(UserError, match=rf"steps_by_stage has {len(steps)} entries for 2 stages \[5, 7\]"):
        build_schedule(config, 10)
