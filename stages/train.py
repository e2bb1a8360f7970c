"""Distil the swapped hybrid from the frozen teacher.

    distill train demo            (or: distill train runs/demo --stage 2)

CONFIG or RUN. Reverse KL by default, everything trainable, AdamW with warm-up and linear decay, on packed reasoning
traces. Continues from its newest checkpoint if it was cut short. Writes ``train/checkpoint``, ``log.jsonl``,
``train.json``, and the weights after chosen steps (``train.keep_steps``) in ``train/steps/000200``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from distill.checkpoints import checkpoints_of
from distill.data.mixture import counts_record, describe_rows
from distill.mixers import set_kernels
from distill.records import read_json, write_json
from distill.schedule import Stage
from distill.storage import new_folder
from distill.teacher import Teacher, load_model, load_tokenizer
from distill.trainer import (
    DistillTrainer,
    KeepSteps,
    append_line,
    fit,
    heldout_loss,
    logged_minutes,
    training_arguments,
)
from stages.common import HELD_OUT_SEED, begin, say, stage_main
from stages.context import Context, need
from stages.lineage import kept, lineage

SCRATCH = ("checkpoints", "start.json")
"""What only a resumption needs."""


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "train", run_stage)


def run_stage(context: Context, stage: Stage) -> bool:
    """Distil one stage; returns whether there was anything to do."""
    need(context.folder(stage, "swap"), "swap")
    step = context.step(stage, "train")
    return step.perform(lambda folder: train(context, stage, folder), resumable=True, scratch=SCRATCH)


def train(context: Context, stage: Stage, folder: Path) -> None:
    config = context.config
    options = config.train
    seed = begin(context, stage, 3)
    tokenizer = load_tokenizer(config.teacher)
    teacher = Teacher(load_model(config.teacher, config.dtype))
    student = load_model(str(context.folder(stage, "swap") / "checkpoint"))
    set_kernels(student, config.kernels)
    rows = context.rows(tokenizer, stage.steps * options.batch_size, seed)
    heldout = context.rows(tokenizer, options.eval_rows, HELD_OUT_SEED, held_out=True)
    log = folder / "log.jsonl"

    def held_out_loss() -> float:
        return heldout_loss(student, teacher, heldout, options.batch_size, options.loss, options.temperature)

    def save(target: Path, step: int | None = None) -> None:
        with new_folder(target) as partial:
            cache, student.config.use_cache = student.config.use_cache, True
            student.save_pretrained(partial)
            student.config.use_cache = cache
            tokenizer.save_pretrained(partial)
            write_json(partial / "lineage.json", lineage(config, context.stages, stage, step))

    start_file = folder / "start.json"
    if not start_file.is_file():
        write_json(start_file, held_out_loss())
    start = read_json(start_file)
    say(f"{stage.name}: {stage.steps} steps, {stage.tokens:,} tokens; held-out {options.loss} before {start:.4f}")
    for line in describe_rows(config.data, rows, tokenizer):
        say(f"data: {line}")
    rewind(folder, stage.keep)
    earlier, began = logged_minutes(log), time.monotonic()
    arguments = training_arguments(options, stage.steps, folder / "checkpoints", seed, config.dtype)
    fit(
        DistillTrainer,
        student.train(),
        rows,
        arguments,
        title=stage.name,
        log=log,
        callbacks=[KeepSteps(stage.keep, lambda step: save(kept(folder, step), step))],
        teacher=teacher,
        loss=options.loss,
        temperature=options.temperature,
        mixer_learning_rate=options.mixer_learning_rate,
    )
    minutes = earlier + (time.monotonic() - began) / 60
    end = held_out_loss()
    for step, loss in ((0, start), (stage.steps, end)):
        append_line(log, {"step": step, "eval_loss": loss})
    save(folder / "checkpoint")
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
