"""Choose the blocks to convert: the least important ones that still have attention.

    distill place demo

CONFIG or RUN. Writes ``place/placement.json``: the mixer of every block, and the blocks that this stage adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.errors import UserError
from distill.placement import hybrid_name, replace
from distill.records import read_record, write_json
from distill.schedule import Stage
from stages.common import say, stage_main
from stages.context import Context, need


def main(args: argparse.Namespace) -> int:
    return stage_main(args, "place", run_stage)


def run_stage(context: Context, stage: Stage) -> bool:
    """Place the new mixers of one stage; returns whether there was anything to do."""
    need(context.folder(stage, "score"), "score")
    return context.step(stage, "place").perform(lambda folder: place(context, stage, folder))


def place(context: Context, stage: Stage, folder: Path) -> None:
    file = context.folder(stage, "score") / "scores.json"
    scores = read_record(file, order=list[int])
    _, before = context.before(stage)
    if stage.added > len(scores["order"]):
        raise UserError(f"{stage.name} adds {stage.added} blocks, but only {len(scores['order'])} were scored")
    added = sorted(scores["order"][: stage.added])
    try:
        mixers = replace(before, added, context.config.mixer.of)
    except UserError as error:
        raise UserError(f"{file} is broken: {error}; remove {file.parent} and score again") from error
    name = hybrid_name(stage.replaced, stage.num_blocks)
    write_json(folder / "placement.json", {"name": name, "mixers": mixers, "added": added})
    kinds = dict.fromkeys(mixers[block] for block in added)
    parts = [f"{[block for block in added if mixers[block] == kind]} get {kind}" for kind in kinds]
    say(f"{name}: blocks {', '.join(parts)}")
