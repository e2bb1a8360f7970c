"""Write the Pareto report of a run: one HTML page, PNGs, CSV.

    distill report runs/demo

CONFIG or RUN, finished or not: what has not been measured says so. Writes ``report/report.html``.
"""

from __future__ import annotations

import argparse

from eval.report import table, write_report
from stages.common import open_run, say


def main(args: argparse.Namespace) -> int:
    context = open_run(args.target, args.overrides, write=False)
    page = write_report(context.run_dir)
    say(table(context.run_dir))
    say(f"report: {page}")
    return 0
