"""Score the importance of every block that still has attention.

    distill score demo            (or: distill score runs/demo --stage H1-7)

CONFIG or RUN. A stage that starts from the teacher uses LOO (accuracy lost when a block is the identity), later ones
MMR (loss after a short distillation with the block swapped), as in Apriel-H1, section 3.1. Writes
``score/scores.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill.importance import Setup, scorer
from distill.mixers import set_kernels
from distill.placement import replaced_blocks
from distill.records import write_json
from distill.schedule import Stage
from distill.teacher import RememberingTeacher, load_model, load_tokenizer
from eval.loglikelihood import prepare
from stages.common import HELD_OUT_SEED, begin, say, stage_main
from stages.context import Context


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "score", run_stage)


def run_stage(context: Context, stage: Stage) -> bool:
    """Score the blocks for one stage; returns whether there was anything to do."""
    context.before(stage)  # it must be there
    return context.step(stage, "score").perform(lambda folder: score(context, stage, folder))


def score(context: Context, stage: Stage, folder: Path) -> None:
    config = context.config
    seed = begin(context, stage, 1)
    tokenizer = load_tokenizer(config.teacher)
    teacher = RememberingTeacher(load_model(config.teacher, config.dtype))  # every candidate sees the same rows
    dtype = "float32" if stage.scorer == "mmr" else config.dtype  # what is trained has float32 weights
    start, mixers = context.before(stage)
    model = load_model(start, dtype)
    set_kernels(model, config.kernels)
    converted = set(replaced_blocks(mixers))
    blocks = [block for block in range(len(mixers)) if block not in converted]
    options = config.score
    say(f"{stage.name}: scoring {len(blocks)} blocks with {stage.scorer}")
    metric: Any = None
    rows: Any = None
    heldout: Any = None
    if stage.scorer == "mmr":
        length = config.data.sequence_length
        rows = context.rows(tokenizer, options.mmr.steps * config.train.batch_size, seed)
        heldout = context.rows(tokenizer, -(-options.mmr.heldout_tokens // length), HELD_OUT_SEED, held_out=True)
    else:
        metric = prepare(
            options.loo.task,
            tokenizer,
            model,
            options.loo.questions,
            few_shot=None if options.loo.few_shot < 0 else options.loo.few_shot,
            local_data=config.measure.local_data,
        ).compare

    def report(block: int, row: dict[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key not in ("block", "score"))
        say(f"  block {block:3d}  score {row['score']:.4f}  ({figures})")

    setup = Setup(
        model=model,
        teacher=teacher,
        blocks=blocks,
        metric=metric,
        rows=rows,
        heldout=heldout,
        config=options,
        train=config.train,
        mixer=config.mixer,
        seed=config.seed,
        kernels=config.kernels,
        dtype=config.dtype,
        scratch=folder / "scratch",
        report=report,
    )
    result = scorer(stage.scorer)(setup)
    write_json(folder / "scores.json", result)
    say(f"  least important first: {result['order']}")
