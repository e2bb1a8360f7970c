"""Write the teacher's top-k logits once, for a training that reads them instead of running the teacher.

    distill cache demo train.teacher_mode=offline train.teacher_top_k=64

CONFIG or RUN. ``distill train`` does this by itself where train.teacher_mode is offline. Interrupted, the same command
continues. Writes ``cache/logits`` (compressed, with checksums) and ``cache/gap.json``: the loss of the stage's hybrid
on held-out rows, from the whole teacher and from what is stored.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from distill.config import RunConfig
from distill.errors import UserError
from distill.mixers import set_kernels
from distill.offline import OfflineTeacher, write_logits
from distill.records import write_json
from distill.schedule import Stage
from distill.teacher import Teacher, load_model, load_tokenizer
from distill.trainer import heldout_loss
from stages.common import HELD_OUT_SEED, begin, say, stage_main
from stages.context import OFFLINE, Context, need


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "cache", run_stage, check=check_offline)


def check_offline(config: RunConfig) -> None:
    """Raise UserError for a run whose trainings read no cached logits."""
    if config.train.teacher_mode != OFFLINE:
        raise UserError(
            f"train.teacher_mode={config.train.teacher_mode} reads no cached logits: set "
            f"train.teacher_mode={OFFLINE} (in the config, or behind the command)"
        )


def run_stage(context: Context, stage: Stage) -> bool:
    """Write the logits for one stage's training; returns whether there was anything to do."""
    need(context.folder(stage, "swap"), "swap")
    return context.step(stage, "cache").perform(lambda folder: cache(context, stage, folder), resumable=True)


def cache(context: Context, stage: Stage, folder: Path) -> None:
    config, options = context.config, context.config.train
    seed = begin(context, stage, 3)
    tokenizer = load_tokenizer(config.teacher)
    teacher = Teacher(load_model(config.teacher, config.dtype))
    heldout = context.rows(tokenizer, options.eval_rows, HELD_OUT_SEED, held_out=True)
    sets = {"heldout": heldout, "train": context.rows(tokenizer, stage.steps * options.batch_size, seed)}
    shown = [time.monotonic()]

    def report(done: int, files: int) -> None:
        if done == files or time.monotonic() - shown[0] > 10:
            shown[0] = time.monotonic()
            say(f"{stage.name}: logits {name} {done}/{files}")

    for name, rows in sets.items():
        (folder / "logits" / name).mkdir(parents=True, exist_ok=True)
        size = max(options.batch_size // options.gradient_accumulation, 1)
        write_logits(teacher, rows, folder / "logits" / name, k=options.teacher_top_k, batch_size=size, report=report)
    student = load_model(str(context.folder(stage, "swap") / "checkpoint"))
    set_kernels(student, config.kernels)
    stored = OfflineTeacher(folder / "logits", student.config.vocab_size)
    exact, approximate = (
        heldout_loss(student, each, heldout, options.batch_size, options.loss, options.temperature)
        for each in (teacher, stored)
    )
    size = sum(path.stat().st_size for path in (folder / "logits").rglob("*.parquet"))
    figures = {"loss": options.loss, "top_k": options.teacher_top_k, "exact": exact, "approximate": approximate}
    write_json(folder / "gap.json", {**figures, "bytes": size})
    say(
        f"{stage.name}: from {options.teacher_top_k} logits a target ({size / 2**20:,.1f} MiB) {options.loss} is an "
        f"approximation: held-out {approximate:.4f}, from the whole teacher {exact:.4f} "
        f"(gap {approximate - exact:+.4f})"
    )
