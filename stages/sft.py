"""Fine-tune a distilled stage on traces, merge it with that stage, and measure the merged model (H1-h-SFT).

    distill sft demo              (or: distill sft runs/demo --stage H1-5 sft.steps=200 sft.alpha=0.7)

CONFIG or RUN. Cross-entropy on the traces' own targets through TRL, by all processes that a launcher started, as
``engine`` says; then merged = alpha * SFT + (1 - alpha) * H1-h, and the report with it. Writes
``posttrain/01-H1-5-SFT/{train,merge,measure}``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill import distributed
from distill.config import RunConfig, TrainConfig
from distill.data.mixture import check_data, counts_record, describe_rows
from distill.engine import sharing
from distill.errors import UserError
from distill.mixers import set_kernels
from distill.placement import tuned_name
from distill.posttrain.merge import merge as average
from distill.posttrain.sft import TraceTrainer, sft_arguments
from distill.posttrain.sft import tune as fine_tune
from distill.progress import append_line, logged_minutes
from distill.records import Step, read_json, read_record, write_json
from distill.schedule import Stage
from distill.teacher import load_model, load_tokenizer
from distill.trainer import heldout_loss
from eval.report import table, write_report
from stages import measure as measuring
from stages.common import HELD_OUT_SEED, begin, find_stage, open_run, say
from stages.context import Context, need
from stages.lineage import lineage_tokens, recorded
from stages.ranks import check_job, share
from stages.training import START, Training, processes, tell

LOSS = "cross_entropy"


def main(args: argparse.Namespace) -> int:
    def planned(context: Context) -> list[Step]:
        if context.config.sft.source:
            check_data(context.sft_source, lambda: load_tokenizer(context.config.teacher), "sft.source")
        return context.sft_steps(pick(context, args.stage))

    def possible(config: RunConfig) -> None:
        check_job(replace(config, train=options_of(config)), "sft")

    context = open_run(args.target, args.overrides, force=args.force, also=planned, check=possible)
    run_stage(context, pick(context, args.stage))
    page = write_report(context.run_dir)
    say("\n" + table(context.run_dir))
    say(f"\nreport: {page}")
    return 0


def pick(context: Context, name: str | None) -> Stage:
    """The stage that ``--stage`` names, or the last that has been distilled; UserError where there is none."""
    if name is not None:
        stage = find_stage(context, name, "train")
        assert stage is not None
        need(context.checkpoint(stage), "train")
        return stage
    done = [stage for stage in context.stages if context.step(stage, "train").done]
    if not done:
        raise UserError(f"no stage of {context.run_dir} has been distilled: run 'distill run' or 'distill train' first")
    return done[-1]


def run_stage(context: Context, stage: Stage) -> bool:
    """Fine-tune, merge and measure one stage; returns whether there was anything to do."""
    name = tuned_name(stage.name)
    did = measuring.run_teacher(context)
    works: tuple[Callable[[Context, Stage, Path], None], ...] = (train, merge, measure)
    for step, work in zip(context.sft_steps(stage), works, strict=True):
        if step.perform(partial(work, context, stage), resumable=work is train, scratch=("checkpoints", START)):
            did = True
        else:
            say(f"{name}: {step.folder.name} is done already")
    return did


def options_of(config: RunConfig) -> TrainConfig:
    """How the fine-tuning trains: ``sft`` where it says, ``train`` for the rest."""
    sft = config.sft
    return replace(
        config.train,
        loss=LOSS,
        steps=sft.steps,
        batch_size=sft.batch_size,
        gradient_accumulation=sft.gradient_accumulation,
        learning_rate=sft.learning_rate,
        mixer_learning_rate=0.0,
        warmup_steps=sft.warmup_steps,
        save_steps=sft.save_steps,
    )


def train(context: Context, stage: Stage, folder: Path) -> None:
    share(context, stage, "sft")
    with sharing(context.config.engine):
        tune(context, stage, folder)


def take_part(context: Context, stage: Stage) -> None:
    """The part of a process that is not the first of its job."""
    with sharing(context.config.engine):
        tune(context, stage, context.sft_steps(stage)[0].partial)


def tune(context: Context, stage: Stage, folder: Path) -> None:
    """The fine-tuning of one stage, by this process alone or by all that share it."""
    config, sft, options = context.config, context.config.sft, options_of(context.config)
    name, seed = tuned_name(stage.name), begin(context, stage, 5)
    tokenizer = load_tokenizer(config.teacher)
    arguments = sft_arguments(options, sft.steps, folder / "checkpoints", seed, config.dtype, config.engine)
    model = load_model(str(context.checkpoint(stage)))
    set_kernels(model, config.kernels)
    data = context.sft_source
    rows = context.rows(tokenizer, sft.steps * sft.batch_size, seed, data=data)
    heldout = held_out(context, tokenizer)
    tokens = sft.steps * sft.batch_size * config.data.sequence_length
    log = folder / "log.jsonl"
    training = Training(
        model, lambda model, size: heldout_loss(model, None, heldout, size, LOSS), sft.batch_size, folder / START
    )

    def prepared(trainer: TraceTrainer) -> None:
        start = training.first_loss(trainer, context)
        tell(f"{name}: {sft.steps} steps, {tokens:,} tokens; held-out {LOSS} before {start:.4f}")
        for line in describe_rows(data, rows, tokenizer) if distributed.rank() == 0 else []:
            tell(f"data: {line}")

    earlier, began = logged_minutes(log), time.monotonic()
    fine_tune(model, tokenizer, rows, arguments, title=name, log=log, prepared=prepared)
    minutes = earlier + (time.monotonic() - began) / 60
    end = training.heldout_loss()
    source = context.checkpoint(stage)
    entry = {"name": name, "tokens": tokens, "steps": sft.steps}
    known = (source / "lineage.json").is_file()
    training.save(folder / "checkpoint", tokenizer, [*recorded(source), entry] if known else [])
    if distributed.rank():
        return
    start = read_json(folder / START)
    for step, loss in ((0, start), (sft.steps, end)):
        append_line(log, {"step": step, "eval_loss": loss})
    losses = {"eval_loss_start": start, "eval_loss_end": end}
    spent = {"steps": sft.steps, "tokens": tokens, "minutes": round(minutes, 3)}
    counts = {"data": counts_record(data, rows), **processes(context)}
    write_json(folder / "train.json", {**spent, "loss": LOSS, **losses, **counts})
    say(f"{name}: held-out {LOSS} {start:.4f} -> {end:.4f} in {minutes:.1f} min")


def merge(context: Context, stage: Stage, folder: Path) -> None:
    sft = context.config.sft
    tuned = context.tuned_folder(stage, "train")
    average(tuned / "checkpoint", context.checkpoint(stage), sft.alpha, folder / "checkpoint")
    model = load_model(str(folder / "checkpoint"))
    set_kernels(model, context.config.kernels)
    heldout = held_out(context, load_tokenizer(context.config.teacher))
    loss = heldout_loss(model, None, heldout, sft.batch_size, LOSS)
    write_json(folder / "merge.json", {"alpha": sft.alpha, "eval_loss": loss})
    losses = read_record(tuned / "train.json", eval_loss_end=float, eval_loss_start=float)
    say(
        f"{tuned_name(stage.name)}: {sft.alpha:g} * SFT + {1 - sft.alpha:g} * {stage.name}; held-out {LOSS} "
        f"{losses['eval_loss_end']:.4f} (SFT), {losses['eval_loss_start']:.4f} ({stage.name}), {loss:.4f} (merged)"
    )


def measure(context: Context, stage: Stage, folder: Path) -> None:
    begin(context, stage, 6)
    train = read_record(context.tuned_folder(stage, "train") / "train.json", tokens=int, minutes=float)
    spent = {
        "tokens": lineage_tokens(context.config, context.stages, stage) + train["tokens"],
        "minutes": train["minutes"],
    }
    checkpoint = context.tuned_folder(stage, "merge") / "checkpoint"
    measuring.measure_hybrid(context, stage, tuned_name(stage.name), checkpoint, spent, folder)


def held_out(context: Context, tokenizer: Any) -> Any:
    """Fixed held-out rows of the traces."""
    rows = context.config.train.eval_rows
    return context.rows(tokenizer, rows, HELD_OUT_SEED, held_out=True, data=context.sft_source)
