"""Write the Pareto report of a run: one HTML page, PNGs, CSV.

    distill report runs/demo

CONFIG or RUN, finished or not: what has not been measured says so. Writes ``report/report.html``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.report import table, write_report
from stages.common import say
from stages.targets import read_config


def main(args: argparse.Namespace) -> int:
    run = Path(read_config(args.target, args.overrides).run_dir).expanduser()
    page = write_report(run)
    say(table(run))
    say(f"report: {page}")
    return 0
