"""Distil the swapped hybrid from the frozen teacher.

    distill train demo            (or: distill train runs/demo --stage 2)
    python -m distill.launch --nproc-per-node 8 -m stages.cli train runs/demo

CONFIG or RUN. Reverse KL by default, everything trainable, AdamW with warm-up and linear decay, on packed reasoning
traces; by all processes that a launcher started, as ``engine`` says. Continues from its newest checkpoint if it was cut
short. Writes ``train/checkpoint``, ``log.jsonl``, ``train.json``, the weights after chosen steps (``train.keep_steps``)
in ``train/steps/000200``, and the best of those that were evaluated (``train.keep_best``) in ``train/best``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from distill import distributed
from distill.checkpoints import checkpoints_of
from distill.data.mixture import counts_record, describe_rows
from distill.engine import loaded_whole, sharing, teacher_mode_of
from distill.groups import describe_groups, freeze, rates_of
from distill.mixers import set_kernels
from distill.offline import OfflineTeacher
from distill.offload import OffloadedTeacher
from distill.progress import KeepBest, KeepSteps, append_line, logged_minutes
from distill.records import read_json, write_json
from distill.schedule import Stage
from distill.teacher import Teacher, load_config, load_model, load_tokenizer
from distill.trainer import DistillTrainer, fit, heldout_loss, training_arguments
from stages import cache
from stages.common import HELD_OUT_SEED, begin, say, stage_main
from stages.context import OFFLINE, Context, need
from stages.lineage import kept, lineage
from stages.ranks import check_job, share
from stages.training import START, Training, processes, tell

SCRATCH = ("checkpoints", START)
"""What only a resumption needs."""


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "train", run_stage, check=partial(check_job, verb="train"))


def run_stage(context: Context, stage: Stage) -> bool:
    """Distil one stage; returns whether there was anything to do."""
    need(context.folder(stage, "swap"), "swap")
    if context.config.train.teacher_mode == OFFLINE:
        cache.run_stage(context, stage)
    step = context.step(stage, "train")
    return step.perform(lambda folder: train(context, stage, folder), resumable=True, scratch=SCRATCH)


def take_part(context: Context, stage: Stage) -> None:
    """The part of a process that is not the first of its job."""
    with sharing(context.config.engine):
        distil(context, stage, context.step(stage, "train").partial)


def train(context: Context, stage: Stage, folder: Path) -> None:
    share(context, stage, "train")
    with sharing(context.config.engine):
        distil(context, stage, folder)


def load_teacher(context: Context, stage: Stage) -> Teacher:
    """The teacher as ``train.teacher_mode`` has it."""
    config = context.config
    mode = teacher_mode_of(config.train, config.engine)
    if mode == OFFLINE:
        vocabulary = load_config(config.teacher).vocab_size
        return OfflineTeacher(context.folder(stage, "cache") / "logits", vocabulary)
    if mode == "offload":
        with loaded_whole():
            return OffloadedTeacher(load_model(config.teacher, config.dtype, device="cpu"))
    if mode == "sharded":
        from distill.sharded import ShardedTeacher

        return ShardedTeacher(load_model(config.teacher, config.dtype))
    with loaded_whole():
        return Teacher(load_model(config.teacher, config.dtype))


def distil(context: Context, stage: Stage, folder: Path) -> None:
    """The training of one stage, by this process alone or by all that share it."""
    config = context.config
    options = config.train
    first, seed = distributed.rank() == 0, begin(context, stage, 3)
    tokenizer = load_tokenizer(config.teacher)
    arguments: TrainingArguments = training_arguments(
        options, stage.steps, folder / "checkpoints", seed, config.dtype, engine=config.engine
    )
    teacher = load_teacher(context, stage)
    student = load_model(str(context.folder(stage, "swap") / "checkpoint"))
    set_kernels(student, config.kernels)
    freeze(student, options.freeze)
    rows = context.rows(tokenizer, stage.steps * options.batch_size, seed)
    heldout = context.rows(tokenizer, options.eval_rows, HELD_OUT_SEED, held_out=True)
    log, start_file = folder / "log.jsonl", folder / START

    def loss_of(model: Any, size: int) -> float:
        return heldout_loss(model, teacher, heldout, size, options.loss, options.temperature)

    training = Training(student, loss_of, options.batch_size, start_file)

    def save(target: Path, step: int | None = None) -> None:
        training.save(target, tokenizer, lineage(config, context.stages, stage, step))

    def prepared(trainer: DistillTrainer) -> None:
        """Before the first step: the held-out loss that the training starts from, and what is trained."""
        start = training.first_loss(trainer, context)
        tell(f"{stage.name}: {stage.steps} steps, {stage.tokens:,} tokens; held-out {options.loss} before {start:.4f}")
        for line in describe_groups(student, options):
            tell(f"  {line}")
        for line in describe_rows(config.data, rows, tokenizer) if first else []:
            tell(f"data: {line}")

    if first:
        rewind(folder, stage.keep)
    earlier, began = logged_minutes(log), time.monotonic()
    best = [KeepBest(folder / "best", training.heldout_loss, save)] if options.keep_best else []
    fit(
        DistillTrainer,
        student.train(),
        rows,
        arguments,
        title=stage.name,
        log=log,
        callbacks=[KeepSteps(stage.keep, lambda step: save(kept(folder, step), step)), *best],
        train=options,
        teacher=teacher,
        loss=options.loss,
        temperature=options.temperature,
        rates=rates_of(options),
        prepared=prepared,
    )
    minutes = earlier + (time.monotonic() - began) / 60
    end = training.heldout_loss()
    save(folder / "checkpoint")
    if not first:
        return
    start = read_json(start_file)
    for step, loss in ((0, start), (stage.steps, end)):
        append_line(log, {"step": step, "eval_loss": loss})
    write_json(
        folder / "train.json",
        {
            "start": stage.start.name,
            "steps": stage.steps,
            "tokens": stage.tokens,
            "minutes": round(minutes, 3),
            "loss": options.loss,
            "eval_loss_start": start,
            "eval_loss_end": end,
            "data": counts_record(config.data, rows),
            **processes(context),
        },
    )
    say(f"{stage.name}: held-out {options.loss} {start:.4f} -> {end:.4f} in {minutes:.1f} min")


def rewind(folder: Path, keep: Sequence[int]) -> None:
    """Remove the checkpoints of an unfinished training that lie past a step which is to be kept and was not."""
    first = min((step for step in keep if not kept(folder, step).is_dir()), default=math.inf)
    late = [path for step, path in checkpoints_of(folder / "checkpoints").items() if step >= first]
    for path in late:
        shutil.rmtree(path)
    if late:
        say(f"step {first} is to be kept and was not: training goes back to before it")
