"""The stage schedule: how many blocks are replaced after each stage, from what, scored how, trained for how long."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import RunConfig
from distill.errors import UserError, nearest
from distill.placement import hybrid_name, parse_name, replaced_blocks
from distill.records import read_json

PAPER_SCHEDULE = (25, 27, 30, 34, 37, 40)
PAPER_BLOCKS = 50
TEACHER = "teacher"
ALLOWED = f"allowed: {TEACHER}, H1-h or H1-h@STEP of an earlier stage, the folder of a hybrid"


@dataclass(frozen=True)
class Start:
    """What a stage starts from: the teacher (the default), an earlier stage of this run, or a hybrid's folder.

    Apriel-H1 started H1-27 from an earlier checkpoint of H1-25 (figure 4): ``stage`` and ``step``.
    """

    name: str = TEACHER
    """``teacher``, ``H1-5/10``, ``H1-5/10@200``, or the folder as it was given."""
    replaced: int = 0
    """Blocks replaced in it."""
    stage: int | None = None
    """Index of the earlier stage."""
    step: int | None = None
    """Its weights after so many steps (None: after the last)."""
    path: str = ""
    """The folder of a hybrid that another run made."""
    mixers: tuple[str, ...] = ()
    """The placement of that hybrid."""


@dataclass(frozen=True)
class Stage:
    """One H1-h/L: its place in the schedule, what it starts from, and its budget."""

    index: int
    replaced: int
    num_blocks: int
    scorer: str
    steps: int
    tokens: int
    start: Start = Start()
    keep: tuple[int, ...] = ()
    """Steps after which the weights are kept."""
    listed: int = 0
    """Of ``score.blocks``, how many still have attention (0: no list is given)."""

    @property
    def name(self) -> str:
        """``H1-5/10``."""
        return hybrid_name(self.replaced, self.num_blocks)

    @property
    def folder(self) -> str:
        """``01-H1-5``: the stage's folder in the run."""
        return f"{self.index + 1:02d}-H1-{self.replaced}"

    @property
    def added(self) -> int:
        """Blocks that this stage replaces."""
        return self.replaced - self.start.replaced

    @property
    def candidates(self) -> int:
        """Blocks that are scored."""
        return self.listed or self.num_blocks - self.start.replaced

    @property
    def branches(self) -> bool:
        """Whether it starts from anything but the end of the stage before (of the teacher, for the first)."""
        usual = self.index - 1 if self.index else None
        return bool(self.start.path) or self.start.step is not None or self.start.stage != usual


def scaled(schedule: Sequence[int], blocks_from: int, blocks_to: int) -> list[int]:
    """A schedule for another depth: rounded, strictly increasing, duplicates dropped."""
    return sorted({h for h in (round(h * blocks_to / blocks_from) for h in schedule) if 0 < h < blocks_to})


def build_schedule(config: RunConfig, num_blocks: int) -> list[Stage]:
    """The stages of a run; with no ``schedule`` given, the paper's, scaled to this depth.

    A stage that starts from the teacher is scored by ``score.first``, any other by ``score.later``.

    Raises UserError where h is not above that of the start, or leaves no block with attention (transformers' cache
    counts tokens in an attention layer, and a model without one is not a hybrid), and for a start that is not there.
    """
    schedule = list(config.schedule) or scaled(PAPER_SCHEDULE, PAPER_BLOCKS, num_blocks)
    if not schedule:
        raise UserError(f"a teacher of {num_blocks} block(s) has no schedule: at least one block must keep attention")
    train = config.train
    if train.steps_by_stage and len(train.steps_by_stage) != len(schedule):
        raise UserError(
            f"train.steps_by_stage has {len(train.steps_by_stage)} entries for {len(schedule)} stages {schedule}"
        )
    chosen = _chosen(config, schedule, num_blocks)
    stages: list[Stage] = []
    for index, replaced in enumerate(schedule):
        given = chosen.get(replaced)
        where = f"start_from.H1-{replaced}={given}"
        start = _default(stages) if given is None else _start(where, given, stages, num_blocks)
        if replaced <= start.replaced and given is None:
            raise UserError(f"schedule={schedule} must increase from at least 1; {replaced} follows {start.replaced}")
        if replaced <= start.replaced:
            raise UserError(
                f"{where}: {start.replaced} blocks are replaced there already; "
                f"H1-{replaced} needs a start with fewer than {replaced}"
            )
        if replaced in schedule[:index]:
            raise UserError(f"schedule={schedule}: {replaced} stands there twice")
        if replaced >= num_blocks:
            raise UserError(
                f"schedule={schedule}: {replaced} is not below the teacher's {num_blocks} blocks; "
                "at least one block must keep attention"
            )
        steps = train.steps_by_stage[index] if train.steps_by_stage else train.steps
        listed = _listed(config.score.blocks, start, stages, replaced, num_blocks)
        stages.append(
            Stage(
                index=index,
                replaced=replaced,
                num_blocks=num_blocks,
                scorer=config.score.first if start.name == TEACHER else config.score.later,
                steps=steps,
                tokens=steps * train.batch_size * config.data.sequence_length,
                start=start,
                listed=listed,
            )
        )
    longest = max(stage.steps for stage in stages)
    if train.keep_steps and max(train.keep_steps) > longest:
        raise UserError(f"train.keep_steps={train.keep_steps}: no stage is trained for more than {longest} steps")
    return [dataclasses.replace(stage, keep=_kept(train.keep_steps, stage, stages)) for stage in stages]


def _listed(blocks: Sequence[int], start: Start, stages: Sequence[Stage], replaced: int, num_blocks: int) -> int:
    """How many of ``score.blocks`` have attention in ``start``; UserError for a block that is not there or has none,
    and where fewer are left than H1-``replaced`` adds."""
    if not blocks:
        return 0
    given = f"score.blocks={list(blocks)}"
    if wrong := [block for block in blocks if not 0 <= block < num_blocks or blocks.count(block) > 1]:
        raise UserError(f"{given}: {wrong[0]} is no block or stands there twice; expected values in [0, {num_blocks})")
    if converted := [block for block in replaced_blocks(start.mixers) if block in blocks]:
        free = [block for block in range(num_blocks) if block not in replaced_blocks(start.mixers)]
        raise UserError(
            f"{given}: block {converted[0]} of {start.name} has no attention any more ({start.mixers[converted[0]]}); "
            f"choose among {free}"
        )
    source = stages[start.stage] if start.stage is not None else None
    left = source.listed - source.added if source is not None else len(blocks)
    if left < replaced - start.replaced:
        raise UserError(
            f"{given}: H1-{replaced} adds {replaced - start.replaced} block(s) to {start.name}, and {left} of these "
            "are left: name more, or lower h in schedule"
        )
    return left


def _kept(asked: Sequence[int], stage: Stage, stages: Sequence[Stage]) -> tuple[int, ...]:
    """The steps of a stage to keep: those asked for that it has, and those that other stages start from."""
    starts = {each.start.step for each in stages if each.start.stage == stage.index and each.start.step is not None}
    return tuple(sorted({step for step in asked if step <= stage.steps} | starts))


def _chosen(config: RunConfig, schedule: Sequence[int], num_blocks: int) -> dict[int, str]:
    """``start_from`` by number of replaced blocks; UserError for a stage that the schedule lacks, or named twice."""
    chosen: dict[int, str] = {}
    for key, value in config.start_from.items():
        replaced, blocks = parse_name(key)
        if replaced not in schedule or blocks not in (None, num_blocks):
            names = [f"H1-{each}" for each in schedule]
            raise UserError(f"start_from: no stage '{key}'{nearest(key, names)}; the schedule has {', '.join(names)}")
        if replaced in chosen:
            raise UserError(f"start_from names H1-{replaced} twice")
        chosen[replaced] = value
    return chosen


def _default(stages: Sequence[Stage]) -> Start:
    """The end of the last of ``stages``, or the teacher."""
    return _after(stages[-1]) if stages else Start()


def _after(stage: Stage, step: int | None = None) -> Start:
    """The weights of a stage after ``step`` steps, or at its end."""
    step = None if step == stage.steps else step
    name = stage.name if step is None else f"{stage.name}@{step}"
    return Start(name, stage.replaced, stage=stage.index, step=step)


def _start(where: str, given: str, stages: Sequence[Stage], num_blocks: int) -> Start:
    """The start that ``given`` names, for the stage that follows ``stages``; ``where`` begins an error."""
    if given == TEACHER:
        return Start()
    match = re.fullmatch(r"([Hh]1-\d+(?:/\d+)?)(?:@(\d+))?", given)
    if not match:
        return _hybrid(where, given, num_blocks)
    replaced, blocks = parse_name(match[1])
    source = next((stage for stage in stages if stage.replaced == replaced), None)
    if source is None or blocks not in (None, num_blocks):
        earlier = ", ".join(f"H1-{stage.replaced}" for stage in stages) or "none"
        raise UserError(f"{where}: no such stage before it (earlier stages: {earlier}); {ALLOWED}")
    step = int(match[2]) if match[2] else None
    if step is not None and not 1 <= step <= source.steps:
        raise UserError(
            f"{where}: H1-{replaced} is trained for {source.steps} steps; give a step in [1, {source.steps}]"
        )
    return _after(source, step)


def _hybrid(where: str, given: str, num_blocks: int) -> Start:
    """The start in the folder ``given``: its placement, read from its config.json."""
    folder = Path(given).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: no such stage, and no folder with config.json; {ALLOWED}")
    config = read_json(folder / "config.json")
    mixers = config.get("mixers") if isinstance(config, dict) else None
    if not isinstance(mixers, list) or not all(isinstance(mixer, str) for mixer in mixers):
        raise UserError(f"{where}: no hybrid, its config.json names no mixers; {ALLOWED}")
    if len(mixers) != num_blocks:
        raise UserError(f"{where}: a hybrid of {len(mixers)} blocks; the teacher has {num_blocks}")
    return Start(given, len(replaced_blocks(mixers)), path=str(folder), mixers=tuple(mixers))
