"""Measure accuracy and decode throughput, teacher and hybrid side by side in one run.

    distill measure demo          (or: distill measure runs/demo --stage H1-5)

CONFIG or RUN. Accuracy through lm-eval (generative and multiple choice); throughput as batch * N / sum of step
times, both models with preallocated in-place caches. Writes ``measure/measure.json``, and the teacher's once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.mixers import set_kernels
from distill.records import read_record, write_json
from distill.schedule import Stage
from distill.teacher import load_model, load_tokenizer
from eval import accuracy, serving, throughput
from stages.common import begin, say, stage_main
from stages.context import Context, need
from stages.lineage import lineage_tokens


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "measure", run_stage)


def run_teacher(context: Context) -> bool:
    """Measure the teacher once a run; returns whether there was anything to do."""
    return context.steps()[0].perform(lambda folder: measure_teacher(context, folder))


def run_stage(context: Context, stage: Stage) -> bool:
    """Measure the hybrid of one stage; returns whether there was anything to do."""
    need(context.checkpoint(stage), "train")
    run_teacher(context)
    return context.step(stage, "measure").perform(lambda folder: measure(context, stage, folder))


def measure_teacher(context: Context, folder: Path) -> None:
    say("teacher: measuring accuracy and throughput")
    model = load_model(context.config.teacher, context.config.dtype)
    record = {
        "name": "teacher",
        "replaced": 0,
        "num_blocks": model.config.num_hidden_layers,
        "tokens": 0,
        "minutes": 0.0,
    }
    write_json(folder / "measure.json", {**record, **figures(context, {"teacher": model})})


def measure(context: Context, stage: Stage, folder: Path) -> None:
    begin(context, stage, 4)
    spent = {
        "tokens": lineage_tokens(context.config, context.stages, stage),
        "minutes": read_record(context.folder(stage, "train") / "train.json", minutes=float)["minutes"],
    }
    measure_hybrid(context, stage, stage.name, context.checkpoint(stage), spent, folder)


def measure_hybrid(
    context: Context, stage: Stage, name: str, checkpoint: Path, spent: dict[str, Any], folder: Path
) -> None:
    """Measure a model with the placement of ``stage`` beside the teacher; ``spent`` is what it cost."""
    say(f"{name}: measuring accuracy and throughput")
    teacher = load_model(context.config.teacher, context.config.dtype)
    model = load_model(str(checkpoint), context.config.dtype)
    set_kernels(model, context.config.kernels)
    record = {"name": name, "replaced": stage.replaced, "num_blocks": stage.num_blocks, **spent}
    write_json(folder / "measure.json", {**record, **figures(context, {"teacher": teacher, name: model})})


def figures(context: Context, models: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the last of ``models``, and throughput of all of them in turns."""
    options = context.config.measure
    name, model = list(models.items())[-1]
    scores = accuracy.evaluate(
        model,
        load_tokenizer(context.config.teacher),
        options.generative,
        options.multiple_choice,
        batch_size=options.batch_size,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        allow_code=options.allow_code_execution,
    )
    for line in scores.lines():
        say(line)
    report = lambda line: say(f"  {line}")  # noqa: E731
    speeds = throughput.measure(models, options.throughput, report)
    fewer = replace(options.throughput, repeats=min(options.throughput.repeats, 3))  # beside the headline
    return {
        "parameters": model.num_parameters(),
        **scores.record,
        "throughput": speeds,
        "headline": throughput.headline(speeds, "teacher", name, options.throughput),
        "serving": serving.details(models, speeds, fewer, report),
    }
