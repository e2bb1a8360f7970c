"""The stage schedule: how many blocks are replaced after each stage, scored how, trained for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.config import RunConfig
from distill.errors import UserError
from distill.placement import hybrid_name

PAPER_SCHEDULE = (25, 27, 30, 34, 37, 40)
PAPER_BLOCKS = 50


@dataclass(frozen=True)
class Stage:
    """One H1-h/L: its place in the schedule and its budget."""

    index: int
    replaced: int
    added: int
    num_blocks: int
    scorer: str
    steps: int
    tokens: int

    @property
    def name(self) -> str:
        """``H1-5/10``."""
        return hybrid_name(self.replaced, self.num_blocks)

    @property
    def folder(self) -> str:
        """``01-H1-5``: the stage's folder in the run."""
        return f"{self.index + 1:02d}-H1-{self.replaced}"


def scaled(schedule: Sequence[int], blocks_from: int, blocks_to: int) -> list[int]:
    """A schedule for another depth: rounded, strictly increasing, duplicates dropped."""
    return sorted({h for h in (round(h * blocks_to / blocks_from) for h in schedule) if 0 < h < blocks_to})


def build_schedule(config: RunConfig, num_blocks: int) -> list[Stage]:
    """The stages of a run; with no ``schedule`` given, the paper's, scaled to this depth.

    Raises UserError where h does not increase, or leaves no block with attention (transformers' cache counts
    tokens in an attention layer, and a model without one is not a hybrid).
    """
    schedule = list(config.schedule) or scaled(PAPER_SCHEDULE, PAPER_BLOCKS, num_blocks)
    if not schedule:
        raise UserError(f"a teacher of {num_blocks} block(s) has no schedule: at least one block must keep attention")
    train = config.train
    if train.steps_by_stage and len(train.steps_by_stage) != len(schedule):
        raise UserError(
            f"train.steps_by_stage has {len(train.steps_by_stage)} entries for {len(schedule)} stages {schedule}"
        )
    stages: list[Stage] = []
    before = 0
    for index, replaced in enumerate(schedule):
        if replaced <= before:
            raise UserError(f"schedule={schedule} must increase from at least 1; {replaced} follows {before}")
        if replaced >= num_blocks:
            raise UserError(
                f"schedule={schedule}: {replaced} is not below the teacher's {num_blocks} blocks; "
                "at least one block must keep attention"
            )
        steps = train.steps_by_stage[index] if train.steps_by_stage else train.steps
        stages.append(
            Stage(
                index=index,
                replaced=replaced,
                added=replaced - before,
                num_blocks=num_blocks,
                scorer=config.score.first if index == 0 else config.score.later,
                steps=steps,
                tokens=steps * train.batch_size * config.data.sequence_length,
            )
        )
        before = replaced
    return stages
