"""Cancel the jobs of a run that wait or work; what is finished stands.

    distill cancel runs/demo

CONFIG or RUN. ``distill submit`` goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import ledger, slurm
from stages.common import say
from stages.targets import read_config


def main(args: argparse.Namespace) -> int:
    run = Path(read_config(args.target, args.overrides).run_dir).expanduser().absolute()
    live = {key: [task for task in tasks if task.live] for key, tasks in ledger.standing(run).items()}
    live = {key: tasks for key, tasks in live.items() if tasks}
    if not live:
        say(f"{run} has no jobs that wait or work")
        return 0
    # the last first: what waits for another must not start as that one goes
    slurm.cancel([task.label for tasks in reversed(live.values()) for task in tasks])
    for key, tasks in live.items():
        say(f"{key}: cancelled ({', '.join(task.label for task in tasks)})")
    say(f"to go on: distill submit {run}")
    return 0
