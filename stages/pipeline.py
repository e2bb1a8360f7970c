"""The whole run: every stage of the schedule, then the report.

    distill run demo

CONFIG or RUN. Score, place, swap, distil and measure, stage by stage. Interrupted, the same command continues: what
is finished is skipped.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

from eval.report import table, write_report
from stages import measure, place, score, swap, train
from stages.common import open_run, say
from stages.context import Context
from stages.ranks import check_job


def main(args: argparse.Namespace) -> int:
    context = open_run(args.target, args.overrides, force=args.force, check=partial(check_job, verb="run"))
    began = time.monotonic()
    run(context)
    say(f"{time.monotonic() - began:.0f} s in all")
    return 0


def run(context: Context) -> None:
    """Loop the schedule over the stages, then write the report."""
    names = " -> ".join(stage.name for stage in context.stages)
    say(f"teacher {context.config.teacher}, {context.stages[0].num_blocks} blocks: {names}; in {context.run_dir}")
    measure.run_teacher(context)
    for stage in context.stages:
        say(f"\n== {stage.name} ({stage.index + 1}/{len(context.stages)}) ==")
        for step in (score, place, swap, train, measure):
            if not step.run_stage(context, stage):
                say(f"{stage.name}: {step.__name__.split('.')[-1]} is done already")
    page = write_report(context.run_dir)
    say("\n" + table(context.run_dir))
    say(f"\nreport: {page}")
