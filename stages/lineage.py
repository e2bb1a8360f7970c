"""Where stages start, and what was trained on from the teacher to them: the lineage.

A lineage is a list, oldest first, of ``{"name", "steps", "tokens", "data", "loss", "run"}``, one entry a training.
Every trained checkpoint carries its own in ``lineage.json``, so that another run can start from it and count on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import RunConfig
from distill.errors import UserError, choose
from distill.hybrid.config import head_dim
from distill.hybrid.surgery import check_options
from distill.importance import taken
from distill.mixers import ATTENTION, available
from distill.records import read_json
from distill.schedule import Stage, build_schedule
from distill.teacher import check_files
from distill.teacher import load_config as load_model_config
from stages.identity import check_same_tokenizer

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Keys of config.json in which a hybrid is its teacher's."""


def stages_of(config: RunConfig, teacher: Any) -> list[Stage]:
    """The stages of a run on a teacher with this (transformers) config, each start checked.

    Raises UserError for a schedule or a start that cannot be, before any weight is read.
    """
    blocks = teacher.num_hidden_layers
    for block in config.mixer.blocks:
        if not 0 <= block < blocks:
            raise UserError(f"mixer.blocks.{block}: the teacher's blocks are 0 to {blocks - 1}")
    stages = build_schedule(config, blocks)
    if "given" in taken(config.score, *(stage.scorer for stage in stages)):
        _check_given(config.score.given, stages, blocks)
    for stage in stages:
        if stage.start.path:
            _check_hybrid(config, stage, teacher)
    return stages


def _check_given(given: Sequence[int], stages: Sequence[Stage], blocks: int) -> None:
    """Refuse a list of blocks by hand that holds others than the teacher's, or too few for the stages."""
    most = max(stage.replaced for stage in stages)
    if beyond := [block for block in given if not 0 <= block < blocks]:
        raise UserError(f"score.given: block {beyond[0]}: the teacher's blocks are 0 to {blocks - 1}")
    if len(given) < most:
        raise UserError(f"score.given names {len(given)} blocks, and H1-{most} replaces {most}: name as many")


def _check_hybrid(config: RunConfig, stage: Stage, teacher: Any) -> None:
    """Refuse a folder that ``stage`` cannot start from: not of this teacher, other mixers, no weights."""
    folder, where = Path(stage.start.path), f"start_from.H1-{stage.replaced}={stage.start.name}"
    if folder.resolve().is_relative_to(Path(config.run_dir).expanduser().resolve()):
        raise UserError(f"{where} lies in this run: name the stage, as H1-h or H1-h@STEP")
    for mixer in sorted(set(stage.start.mixers) - {ATTENTION}):
        choose(f"mixer in {folder / 'config.json'}:", mixer, available())
    theirs = load_model_config(str(folder))
    if theirs.model_type.removeprefix("hybrid_") != teacher.model_type:
        raise UserError(f"{where}: a {theirs.model_type}; the teacher is a {teacher.model_type}")
    for key in SHAPE:
        hybrids, teachers = (head_dim(c) if key == "head_dim" else getattr(c, key) for c in (theirs, teacher))
        if hybrids != teachers:
            raise UserError(f"{where}: its {key} is {hybrids}; the teacher's is {teachers}")
    try:
        check_options(theirs, config.mixer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{where}: the folder holds no weights (*.safetensors)")
    check_files(str(folder))
    check_same_tokenizer(str(folder), config.teacher)
    recorded(folder)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The lineage that a checkpoint carries; empty where it has no lineage.json. UserError for a broken one."""
    file = folder / "lineage.json"
    if not file.is_file():
        return []
    entries = read_json(file)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("tokens"), int) for entry in entries
    ):
        raise UserError(
            f"{file} is broken: expected a list of entries with tokens; mend it, or remove it to count none"
        )
    return entries


def unrecorded(stages: Sequence[Stage]) -> list[str]:
    """A warning for every start whose earlier tokens are not known."""
    return [
        f"{stage.name} starts from {stage.start.name}, which has no lineage.json: tokens spent on it count as 0"
        for stage in stages
        if stage.start.path and not (Path(stage.start.path) / "lineage.json").is_file()
    ]


def kept(train: Path, step: int) -> Path:
    """Where a train folder keeps the weights after ``step`` steps."""
    return train / "steps" / f"{step:06d}"


def lineage(config: RunConfig, stages: Sequence[Stage], stage: Stage, step: int | None = None) -> list[dict[str, Any]]:
    """The lineage of a stage's weights after ``step`` steps (None: at its end), counted from the teacher."""
    start, steps = stage.start, stage.steps if step is None else step
    before: list[dict[str, Any]] = []
    if start.stage is not None:
        before = lineage(config, stages, stages[start.stage], start.step)
    elif start.path:
        before = recorded(Path(start.path))
    entry = {
        "name": stage.name,
        "steps": steps,
        "tokens": steps * (stage.tokens // stage.steps),
        "data": " + ".join(part.source for part in config.data.mixture) or config.data.source,
        "loss": config.train.loss,
        "run": config.name,
    }
    return [*before, entry]


def lineage_tokens(config: RunConfig, stages: Sequence[Stage], stage: Stage) -> int:
    """Tokens trained on from the teacher up to and including a stage, along its lineage."""
    return sum(entry["tokens"] for entry in lineage(config, stages, stage))


def misplaced(run_dir: Path, stages: Sequence[Stage]) -> dict[Path, Stage]:
    """Folders of stages that the schedule now gives another number, which is part of their seed."""
    found: dict[Path, Stage] = {}
    for folder in sorted((run_dir / "stages").glob("[0-9]*-H1-*")):
        number, _, name = folder.name.partition("-")
        if not number.isdigit() or not folder.is_dir():
            continue
        stage = next((stage for stage in stages if name == f"H1-{stage.replaced}"), None)
        if stage is not None and folder.name != stage.folder and any(folder.iterdir()):
            found[folder] = stage
    return found
