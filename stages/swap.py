"""Swap the mixers of the chosen blocks, initialised from the attention that they replace (MIL).

    distill swap demo

CONFIG or RUN. Writes ``swap/checkpoint``: a hybrid that Hugging Face tools load, before any training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.hybrid.surgery import hybridize
from distill.schedule import TEACHER, Stage
from distill.teacher import load_model, load_tokenizer
from stages.common import begin, say, stage_main
from stages.context import Context, need


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "swap", run_stage)


def run_stage(context: Context, stage: Stage) -> bool:
    """Swap the mixers of one stage; returns whether there was anything to do."""
    need(context.folder(stage, "place"), "place")
    return context.step(stage, "swap").perform(lambda folder: swap(context, stage, folder))


def swap(context: Context, stage: Stage, folder: Path) -> None:
    config = context.config
    begin(context, stage, 2)
    placement = context.placement(stage)
    start, _ = context.before(stage)
    dtype = config.dtype if stage.start.name == TEACHER else "float32"  # what was trained keeps its float32 weights
    model = load_model(start, dtype)
    hybrid = hybridize(model, placement["mixers"], config.mixer, seed=config.seed, take=True)
    hybrid.save_pretrained(folder / "checkpoint")
    load_tokenizer(config.teacher).save_pretrained(folder / "checkpoint")
    say(f"{stage.name}: {len(placement['added'])} mixers of {stage.start.name} start from {config.mixer.init}")
