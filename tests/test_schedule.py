"""The stage schedule: the paper's, scaled to other depths, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import DataConfig, RunConfig, ScoreConfig, TrainConfig
from distill.errors import UserError
from distill.schedule import PAPER_BLOCKS, PAPER_SCHEDULE, build_schedule, scaled
from stages.lineage import lineage, lineage_tokens


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


def test_a_chosen_start() -> None:
    """What a stage adds, how it is scored, and what is kept follow from its start."""
    config = RunConfig(
        schedule=[5, 7, 8, 6],
        start_from={"H1-7": "H1-5@20", "h1-8/10": "H1-5/10", "H1-6": "teacher"},
        train=TrainConfig(steps=30, keep_steps=[10, 30]),
    )
    stages = build_schedule(config, 10)
    assert [stage.start.name for stage in stages] == ["teacher", "H1-5/10@20", "H1-5/10", "teacher"]
    assert [stage.added for stage in stages] == [5, 2, 3, 6]
    assert [stage.scorer for stage in stages] == ["loo", "mmr", "mmr", "loo"]
    assert [stage.keep for stage in stages] == [(10, 20, 30), (10, 30), (10, 30), (10, 30)]
    assert [stage.branches for stage in stages] == [False, True, True, True]
    assert [stage.folder for stage in stages] == ["01-H1-5", "02-H1-7", "03-H1-8", "04-H1-6"]
    named = build_schedule(RunConfig(schedule=[5, 7], start_from={"H1-5": "teacher", "H1-7": "H1-5@100"}), 10)
    assert named == build_schedule(RunConfig(schedule=[5, 7]), 10), "what is the default anyway changes nothing"
    short = RunConfig(schedule=[5, 7], train=TrainConfig(steps_by_stage=[10, 30], keep_steps=[20]))
    assert [stage.keep for stage in build_schedule(short, 10)] == [(), (20,)]


def test_a_start_in_a_folder(tmp_path: Path) -> None:
    """The number of blocks that it has replaced is read from its config.json."""
    (tmp_path / "config.json").write_text(json.dumps({"mixers": ["mamba1", "attention", "mamba1", "attention"]}))
    (stage,) = build_schedule(RunConfig(schedule=[3], start_from={"H1-3": str(tmp_path)}), 4)
    assert (stage.added, stage.scorer, stage.branches) == (1, "mmr", True)
    assert stage.start.mixers == ("mamba1", "attention", "mamba1", "attention")
    with pytest.raises(UserError, match="2 blocks are replaced there already; H1-2 needs a start with fewer than 2"):
        build_schedule(RunConfig(schedule=[2], start_from={"H1-2": str(tmp_path)}), 4)


def test_tokens_are_counted_along_the_lineage() -> None:
    config = RunConfig(
        schedule=[5, 7, 8],
        start_from={"H1-7": "H1-5@20", "H1-8": "H1-7@1"},
        train=TrainConfig(steps_by_stage=[30, 10, 3], batch_size=2, gradient_accumulation=2),
        data=DataConfig(sequence_length=100),
    )
    stages = build_schedule(config, 10)
    assert [lineage_tokens(config, stages, stage) for stage in stages] == [6000, 4000 + 2000, 4000 + 200 + 600]
    assert [entry["steps"] for entry in lineage(config, stages, stages[2])] == [20, 1, 3]


def test_candidates_are_those_listed_that_still_have_attention() -> None:
    stages = build_schedule(RunConfig(schedule=[2, 3], score=ScoreConfig(blocks=[1, 4, 6, 9])), 10)
    assert [stage.candidates for stage in stages] == [4, 2]
    assert [stage.candidates for stage in build_schedule(RunConfig(schedule=[2, 3]), 10)] == [10, 8]


def test_a_listed_block_without_attention_is_named(tmp_path: Path) -> None:
    mixers = ["attention", "mamba1", "attention", "attention"]
    (tmp_path / "config.json").write_text(json.dumps({"mixers": mixers}))
    config = RunConfig(schedule=[2], start_from={"H1-2": str(tmp_path)}, score=ScoreConfig(blocks=[1, 2]))
    with pytest.raises(
        UserError, match=r"block 1 of .* has no attention any more \(mamba1\); choose among \[0, 2, 3\]"
    ):
        build_schedule(config, 4)
