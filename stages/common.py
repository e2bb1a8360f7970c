"""What every verb shares: threads, opening a run with everything checked, choosing a stage, seeds."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from distill import distributed, tracking
from distill.config import VERSION, RunConfig, ScoreConfig
from distill.config_merge import dump_config, load_config
from distill.data.mixture import check_data
from distill.data.sources import EMBEDDED
from distill.errors import UserError
from distill.hybrid.surgery import check_teacher, hybrid_config
from distill.importance import needs
from distill.importance.comparison import entries
from distill.lock import hold
from distill.placement import ATTENTION, parse_name, replace
from distill.records import Step, dependents, forget, verify, write_text
from distill.schedule import Stage
from distill.storage import full_disk_named
from distill.teacher import check_files, check_tokenizer, load_tokenizer, trust_code
from distill.teacher import load_config as load_model_config
from eval import accuracy
from eval.suites import check_tasks
from stages.context import Context, need
from stages.identity import data_identity, identity
from stages.lineage import misplaced, stages_of, unrecorded
from stages.speedup import settle
from stages.targets import check_device, read_config

HELD_OUT_SEED = 90_001  # validation rows: the same for every stage and candidate


def set_threads(threads: int) -> int:
    """Fix the number of CPU threads (0: this process's share of the cores); returns it."""
    count = threads or max(len(os.sched_getaffinity(0)) // distributed.neighbours(), 1)
    torch.set_num_threads(count)
    return count


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def open_run(
    target: str,
    overrides: list[str],
    *,
    force: bool = False,
    write: bool = True,
    also: Callable[[Context], list[Step]] | None = None,
    check: Callable[[RunConfig], None] | None = None,
    config: RunConfig | None = None,
) -> Context:
    """Open the run that CONFIG or RUN names: check everything that can be checked before work is spent.

    With ``write`` the resolved config goes to ``run.yaml``, and what was finished with other inputs is refused, or
    (``force``) forgotten together with all that depends on it: steps of the run, and those that ``also`` names (a
    fine-tuning is checked only by the verb that does it). ``check`` is what a verb asks of the config besides;
    ``config`` stands in for the one that would be read.
    """
    config = config or read_config(target, overrides)
    if check is not None:
        check(config)
    existing = Path(config.run_dir).expanduser() / "run.yaml"
    if not config.threads and existing.is_file():  # a run keeps its number of threads on another machine
        config.threads = load_config(RunConfig, existing).threads
    threads = set_threads(config.threads)
    trust_code(config.teacher, config.trust_remote_code)
    model = load_model_config(config.teacher)
    check_teacher(model)
    settle(config, model, say)
    stages = stages_of(config, model)
    attention = [ATTENTION] * model.num_hidden_layers
    named = [block for block in range(len(attention)) if block not in config.mixer.blocks][:1]  # of mixer.name
    for block in (*named, *config.mixer.blocks):  # the mixers' options fit the teacher's shape
        hybrid_config(model, replace(attention, [block], config.mixer.of), config.mixer)
    if write:
        tracking.check(config.tracking.wandb)
        check_device(config)
        check_inputs(config, model)
    config.threads = threads
    teacher, data = identity(config.teacher, model), data_identity(config.data)
    folders = {stage.start.path for stage in stages} - {""}
    starts = {folder: f"hybrid {identity(folder, load_model_config(folder))}" for folder in sorted(folders)}
    context = Context(config, Path(config.run_dir).expanduser(), stages, threads, teacher, data, data, starts)
    if config.sft.source:
        context.sft_data = data_identity(context.sft_source)
    if write:
        more = also(context) if also else []
        try:
            context.run_dir.mkdir(parents=True, exist_ok=True)
            hold(context.run_dir / "run.lock", str(context.run_dir))
            tracking.begin(context.run_dir, config.name, config.tracking.wandb)
            check_finished(context, more, force=force)
            for line in unrecorded(stages):
                say(f"warning: {line}")
            with full_disk_named(context.run_dir):
                write_text(context.run_dir / "run.yaml", f"version: {VERSION}\n{dump_config(config)}")
        except OSError as error:
            raise UserError(f"cannot write to run_dir={config.run_dir}: {error.strerror}") from error
    return context


def check_inputs(config: RunConfig, model: Any) -> None:
    """Raise UserError for files, a tokenizer, data or tasks that could not be worked with; ``model`` is the teacher's
    config."""
    check_files(config.teacher)
    sources = [entry.source for entry in config.data.mixture] or [config.data.source]
    check_tokenizer(config.teacher, model.vocab_size, chats=EMBEDDED in sources)
    check_data(config.data, lambda: load_tokenizer(config.teacher))
    accuracy.check(config.measure)
    loo = [entry.options.loo.task for entry in entries(config.score, config.score.first)]
    asked = list(dict.fromkeys([*loo, *recall_tasks(config.score)]))
    check_tasks(asked, "multiple_choice", allow_code=config.measure.allow_code_execution)
    accuracy.check_data([(task, "multiple_choice") for task in asked], config.measure.local_data)
    window = getattr(model, "max_position_embeddings", None) or float("inf")
    if config.measure.max_new_tokens >= window:
        raise UserError(
            f"measure.max_new_tokens={config.measure.max_new_tokens} leaves no room for a question in the "
            f"teacher's {window} positions (max_position_embeddings): it must be below that"
        )


def recall_tasks(score: ScoreConfig) -> list[str]:
    """The tasks of ``score.recall_drop``, where a stage may be scored by it; UserError where it has none to compare."""
    every = [(score.later, score), *((entry.scorer, entry.options) for entry in entries(score, score.first))]
    used = [options.recall_drop for name, options in every if "tasks" in needs(options, name)]
    if not all(options.recall and options.rest for options in used):
        raise UserError("score.recall_drop needs at least one task under recall and one under rest")
    return [task for options in used for task in (*options.recall, *options.rest)]


def check_finished(context: Context, also: list[Step], *, force: bool) -> None:
    """Refuse what was finished with other inputs, or (``force``) remove it together with all that depends on it."""
    for folder, stage in misplaced(context.run_dir, context.stages).items():
        if not force:
            raise UserError(
                f"{folder} was made as stage {int(folder.name.split('-')[0])} of the schedule, and {stage.name} is now "
                f"stage {stage.index + 1}: put new stages at the end (start_from says where each starts), take "
                "another run_dir, or use --force to redo it under its new number"
            )
        shutil.rmtree(folder)
    steps = context.steps()
    stale: set[str] = set()
    for step in [*context.run_steps(), *also]:
        if step.name in dependents(steps, stale):
            continue
        try:
            step.check()
            check_kept(context, step)
        except UserError:
            if not force:
                raise
            stale.add(step.name)
    forget(steps, stale)


def check_kept(context: Context, step: Step) -> None:
    """Raise UserError where ``step`` is a finished training that did not keep what a later stage has to start from."""
    for stage in context.stages:
        start = stage.start
        if start.stage is None or start.step is None or context.step(stage, "swap").done:
            continue
        source = context.stages[start.stage]
        model = context.checkpoint(source, start.step)
        if step.done and step.folder == context.folder(source, "train") and not model.is_dir():
            found = ", ".join(str(int(path.name)) for path in sorted(model.parent.glob("[0-9]*"))) or "none"
            raise UserError(
                f"start_from.H1-{stage.replaced}={start.name}: {source.name} is trained already, and step {start.step} "
                f"was not kept (kept: {found}). Start from one of those or from its end (H1-{source.replaced}), or "
                f"use --force to train {source.name} again and redo what depends on it"
            )


def find_stage(context: Context, name: str | None, step: str) -> Stage | None:
    """The stage that ``--stage`` names, or the first in which ``step`` is not done; None when all are."""
    if name is None:
        return next((stage for stage in context.stages if not context.step(stage, step).done), None)
    if name.isdecimal() and 1 <= int(name) <= len(context.stages):
        return context.stages[int(name) - 1]
    names = {stage.name: stage for stage in context.stages}
    if not name.isdecimal():
        replaced, blocks = parse_name(name)
        for stage in context.stages:
            if stage.replaced == replaced and blocks in (None, stage.num_blocks):
                return stage
    raise UserError(f"no stage '{name}'; this run has {', '.join(names)} (or 1 to {len(names)})")


def stage_main(
    args: argparse.Namespace,
    step: str,
    perform: Callable[[Context, Stage], bool],
    check: Callable[[RunConfig], None] | None = None,
) -> int:
    """The main of a verb that does one step of one stage."""

    def named(context: Context) -> list[Step]:
        if args.stage is not None:
            find_stage(context, args.stage, step)  # refused before anything is written
        return []

    context = open_run(args.target, args.overrides, force=args.force, also=named, check=check)
    stage = find_stage(context, args.stage, step)
    if stage is None:
        if args.force:
            raise UserError(f"{step} is done in every stage: --force needs --stage to say which to redo")
        say(f"{step} is done in every stage of {context.run_dir}")
        return 0
    if args.force:
        for path in context.step(stage, step).reads:  # before anything is lost
            verify(need(path, "run"))
        forget(context.steps(), {f"{stage.folder}/{step}"})
    if not perform(context, stage):
        say(f"{stage.name}: {step} is done already")
    return 0


def begin(context: Context, stage: Stage, purpose: int) -> int:
    """Seed everything for a step; returns the seed."""
    seed = context.seed(stage, purpose)
    set_seed(seed)
    return seed
