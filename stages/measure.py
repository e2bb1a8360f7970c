"""Measure accuracy and throughput, teacher and hybrid side by side in one run; or the accuracy of any checkpoint.

    distill measure demo          (or: distill measure runs/demo --stage H1-5)
    distill measure embedded runs/demo/stages/01-H1-5 measure.limit=20 --output accuracy.json
    distill measure runs/demo_mamba2 --stage H1-5 --gguf hybrid.gguf

CONFIG or RUN: one stage of a run, accuracy through lm-eval (generative and multiple choice), throughput as batch * N /
sum of step times. Writes ``measure/measure.json``, and the teacher's once. Interrupted, it goes on with the next task.

CHECKPOINT...: one or several models, each a folder with config.json, a stage's folder, a hub name or ``embedded``,
scored with the tasks of ``--config`` (or the defaults) and what key=value sets, as in
measure.generative=[gsm8k,math500]. Prints a table and writes the records to ``--output``. Accuracy alone: 'distill
bench' measures speed. A GGUF file that 'distill export' wrote is a CHECKPOINT, too; with --gguf it is measured in its
RUN, through llama.cpp and beside the teacher, and stands in the report as H1-h/L-Q8_0 or whatever its type is.
"""

from __future__ import annotations

import argparse
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.mixers import set_kernels
from distill.records import read_json, read_record, write_json
from distill.schedule import Stage
from distill.teacher import load_model, load_tokenizer
from eval import accuracy, serving, throughput
from eval.report import table, write_report
from stages import checkpoints, gguf_files
from stages.common import begin, find_stage, open_run, say, stage_main
from stages.context import Context, need
from stages.identity import check_same_tokenizer
from stages.lineage import lineage_tokens
from stages.targets import is_run

DONE = "tasks"
"""Folder of what is scored already, a record a task, in the step that is under way."""


def main(args: argparse.Namespace) -> int:
    given = [text for text in args.target if not re.match(r"[A-Za-z_][\w.-]*=", text) or Path(text).exists()]
    args.overrides = [*(text for text in args.target if text not in given), *args.overrides]
    runs = [text for text in given if is_run(text)]
    if not given:
        raise UserError("name what to measure: a CONFIG or RUN, or one or several CHECKPOINTs")
    if not runs:
        if args.gguf:
            raise UserError(
                f"--gguf goes with the RUN that {args.gguf} came from; alone it is a CHECKPOINT: name it so"
            )
        return checkpoints.main(given, args)
    if len(given) > 1:
        raise UserError(f"'{runs[0]}' is a CONFIG or RUN, of which one is measured at a time; several are CHECKPOINTs")
    if args.config or args.output:
        option = "--config" if args.config else "--output"
        raise UserError(f"{option} goes with CHECKPOINTs; '{runs[0]}' is a CONFIG or RUN, which has its own")
    args.target = runs[0]
    if args.gguf:
        return run_file(args)
    return stage_main(args, "measure", run_stage)


def run_teacher(context: Context) -> bool:
    """Measure the teacher once a run; returns whether there was anything to do."""
    step = context.steps()[0]
    return step.perform(lambda folder: measure_teacher(context, folder), resumable=True, scratch=(DONE,))


def run_stage(context: Context, stage: Stage) -> bool:
    """Measure the hybrid of one stage; returns whether there was anything to do."""
    need(context.checkpoint(stage), "train")
    run_teacher(context)
    step = context.step(stage, "measure")
    return step.perform(lambda folder: measure(context, stage, folder), resumable=True, scratch=(DONE,))


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
    found = figures(context, {"teacher": model}, context.config.teacher, folder)
    write_json(folder / "measure.json", {**record, **found})


def measure(context: Context, stage: Stage, folder: Path) -> None:
    begin(context, stage, 4)
    measure_hybrid(context, stage, stage.name, context.checkpoint(stage), spent_on(context, stage), folder)


def run_file(args: argparse.Namespace) -> int:
    """Measure a GGUF file in the run of the stage that it came from."""
    if args.stage is None:
        raise UserError(f"--gguf {args.gguf} needs --stage: of which stage of the run, such as H1-5?")
    target = gguf_files.found(args.gguf)
    context = open_run(args.target, args.overrides)
    stage = find_stage(context, args.stage, "measure")
    assert stage is not None
    need(context.checkpoint(stage), "train")
    step = gguf_files.file_step(context, stage, target)
    if args.force and step.done:
        shutil.rmtree(step.folder)
    run_teacher(context)
    spent = spent_on(context, stage)
    work = lambda folder: gguf_files.measured_beside(context, stage, target, spent, folder, figures)  # noqa: E731
    if not step.perform(work, resumable=True, scratch=(DONE,)):
        say(f"{step.name} is done already")
    page = write_report(context.run_dir)
    say("\n" + table(context.run_dir))
    say(f"\nreport: {page}")
    return 0


def spent_on(context: Context, stage: Stage) -> dict[str, Any]:
    """What a stage's model cost."""
    return {
        "tokens": lineage_tokens(context.config, context.stages, stage),
        "minutes": read_record(context.folder(stage, "train") / "train.json", minutes=float)["minutes"],
    }


def measure_hybrid(
    context: Context, stage: Stage, name: str, checkpoint: Path, spent: dict[str, Any], folder: Path
) -> None:
    """Measure a model with the placement of ``stage`` beside the teacher; ``spent`` is what it cost."""
    say(f"{name}: measuring accuracy and throughput")
    check_same_tokenizer(str(checkpoint), context.config.teacher)
    teacher = load_model(context.config.teacher, context.config.dtype)
    model = load_model(str(checkpoint), context.config.dtype)
    set_kernels(model, context.config.kernels)
    record = {"name": name, "replaced": stage.replaced, "num_blocks": stage.num_blocks, **spent}
    found = figures(context, {"teacher": teacher, name: model}, str(checkpoint), folder)
    write_json(folder / "measure.json", {**record, **found})


def figures(
    context: Context, models: dict[str, Any], checkpoint: str, folder: Path, asked: Any = None
) -> dict[str, Any]:
    """Accuracy of the last of ``models``, which came from ``checkpoint``, and throughput of all of them in turns. What
    is scored is kept in ``folder`` task by task. ``asked`` answers where the last of ``models`` is an engine."""
    options = context.config.measure
    name, model = list(models.items())[-1]
    model = asked or model
    done = folder / DONE
    done.mkdir(exist_ok=True)
    scores = accuracy.evaluate(
        model,
        load_tokenizer(context.config.teacher),
        options,
        seed=context.config.seed,
        name=f"{name} ({checkpoint})",
        report=say,
        done={str(path.relative_to(done).with_suffix("")): read_json(path) for path in done.glob("*/*.json")},
        keep=lambda task, record: keep(done / f"{task}.json", record),
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


def keep(file: Path, record: dict[str, Any]) -> None:
    """Write what a task scored, so that it is not scored again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
