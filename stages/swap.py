"""Swap the mixers of the chosen blocks, initialised from the attention that they replace (MIL).

    distill swap demo

CONFIG or RUN. Writes ``swap/checkpoint``: a hybrid that Hugging Face tools load, before any training. With
``mixer.init: aligned`` the new mixers are those that the score step has aligned and kept, or where the stage's score
aligns none, the same ones aligned here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill.hybrid.surgery import hybridize
from distill.importance.alignment import align
from distill.importance.mixer_store import FOLDER, MixerStore
from distill.mixers import set_kernels
from distill.schedule import TEACHER, Stage
from distill.teacher import load_model, load_tokenizer
from stages.common import begin, say, stage_main
from stages.context import ALIGNED, SCORING, Context, mixers_of, need, rows_to_align


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
    aligned = aligned_weights(context, stage, model, placement["added"]) if config.mixer.init == ALIGNED else None
    hybrid = hybridize(model, placement["mixers"], config.mixer, seed=config.seed, take=True, given=aligned)
    hybrid.save_pretrained(folder / "checkpoint")
    load_tokenizer(config.teacher).save_pretrained(folder / "checkpoint")
    say(f"{stage.name}: {len(placement['added'])} mixers of {stage.start.name} start from {config.mixer.init}")


def aligned_weights(context: Context, stage: Stage, model: Any, blocks: list[int]) -> dict[int, dict[str, Any]]:
    """By block, the weights of its aligned mixer: kept by the score step, or aligned here on the same rows."""
    config, step = context.config, context.step(stage, "score")
    store = MixerStore(step.folder / FOLDER, mixers_of(step, config.score))
    kept = {block: found[0] for block in blocks if (found := store.read(block)) is not None}
    if left := [block for block in blocks if block not in kept]:
        set_kernels(model, config.kernels)
        rows = context.rows(load_tokenizer(config.teacher), rows_to_align(config), context.seed(stage, SCORING))
        made = align(
            model, left, rows, config.mixer, config.score.aligned,
            batch_size=config.train.batch_size, seed=config.seed, kernels=config.kernels, dtype=config.dtype, say=say,
        )  # fmt: skip
        kept |= {block: mixer.state_dict() for block, mixer in made.mixers.items()}
    return kept
