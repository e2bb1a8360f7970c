"""Write the report: one HTML page, figures as PNG and SVG, tables as CSV and Parquet, report.md for a model card.

    distill report runs/demo
    distill report runs/demo runs/other --external models.csv --budget 0.98

CONFIG or RUN, one or several, finished or not: what has not been measured says so. Writes ``RUN/report/report.html``;
of several runs, which then stand on one Pareto plot with what differs between them, ``report/with-OTHER`` of the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.errors import UserError
from eval.report import table, write_report
from stages.common import say
from stages.targets import read_config


def main(args: argparse.Namespace) -> int:
    runs, overrides = split(args.targets)
    if len(runs) > 1 and overrides:
        raise UserError(f"{overrides[0]} with {len(runs)} runs: of which? Leave it out, or report one run")
    if not 0 < args.budget <= 1:
        hint = f": {args.budget:g} per cent is {args.budget / 100:g}" if 1 < args.budget <= 100 else ""
        raise UserError(f"--budget={args.budget:g} must be a share of the teacher's accuracy, in (0, 1]{hint}")
    folders = [Path(read_config(run, overrides).run_dir).expanduser() for run in runs]
    external = Path(args.external).expanduser() if args.external else None
    output = Path(args.output).expanduser() if args.output else None
    page = write_report(*folders, keep=args.budget, external=external, output=output)
    say(table(*folders))
    say(f"report: {page}")
    return 0


def split(targets: list[str]) -> tuple[list[str], list[str]]:
    """What is a CONFIG or RUN, and what is key=value."""
    overrides = [text for text in targets if "=" in text and not Path(text).expanduser().exists()]
    runs = [text for text in targets if text not in overrides]
    if not runs:
        raise UserError("which run? Give a RUN (a folder with run.yaml) or a CONFIG")
    return runs, overrides
