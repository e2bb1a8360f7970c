"""Show packed rows as a training reads them: the text, where documents begin, and what is learned (``--show N``).

distill traces --show 3 my.yaml data.mask=assistant
distill traces --show 3 --teacher /models/my-llama --prompts traces.jsonl data.sequence_length=4096
"""

from __future__ import annotations

import argparse
import os
import sys

from distill.config import RunConfig
from distill.config_merge import merge_config
from distill.data.mixture import check_data, describe, describe_rows, describe_survey, load_data
from distill.data.show import COLOUR, PLAIN, show_row
from distill.errors import UserError
from distill.teacher import load_tokenizer, trust_code
from stages.common import say
from stages.targets import check, read_config


def main(args: argparse.Namespace) -> int:
    if args.show < 1:
        raise UserError(f"--show {args.show} must be above 0: it is the number of rows")
    config = read(args)
    trust_code(config.teacher, config.trust_remote_code or args.trust_remote_code)
    data, tokenizer = config.data, load_tokenizer(config.teacher)
    check_data(data, lambda: tokenizer)
    rows = load_data(data, tokenizer, args.show, config.seed * 1000 + 3)  # those that the first stage begins with
    marks = COLOUR if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else PLAIN
    say(f"{describe(data)}; data.mask={data.mask}: what is learned stands {marks[0]}like this{marks[1]}")
    for index in range(args.show):
        say(f"\nrow {index + 1}")
        for line in show_row(rows[index], tokenizer, marks):
            say(line)
    say("")
    for line in describe_survey(data, lambda: tokenizer) or describe_rows(data, rows, tokenizer):
        say(line)
    return 0


def read(args: argparse.Namespace) -> RunConfig:
    """The config that is shown: CONFIG or RUN, or the defaults; ``--teacher`` and ``--prompts`` set over it."""
    overrides = list(args.overrides)
    target = args.target
    if target is not None and "=" in target:
        target, overrides = None, [target, *overrides]
    if args.prompts:
        overrides.insert(0, f"data.source={args.prompts}")
    if args.teacher:
        overrides.insert(0, f"teacher={args.teacher}")
    if target is not None:
        return read_config(target, overrides)
    if not overrides:
        raise UserError("--show needs a CONFIG, a RUN, or --teacher and --prompts: whose rows?")
    config = merge_config(RunConfig, [], overrides)
    check(config)
    return config
