"""The console script ``distill``: ``distill VERB TARGET [key=value ...]``."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import NoReturn

from stages.options import OPTIONS

VERBS = {
    "run": "stages.pipeline",
    "plan": "stages.plan",
    "score": "stages.score",
    "place": "stages.place",
    "swap": "stages.swap",
    "cache": "stages.cache",
    "train": "stages.train",
    "measure": "stages.measure",
    "bench": "stages.bench",
    "report": "stages.report",
    "sft": "stages.sft",
    "merge": "stages.merge",
    "package": "stages.package",
    "export": "stages.export",
    "import": "stages.import_native",
    "quantize": "stages.quantize",
    "submit": "stages.submit",
    "status": "stages.status",
    "cancel": "stages.cancel",
    "pretrain": "stages.pretrain",
    "traces": "stages.traces",
}
TARGETS = {"pretrain": "CONFIG", "plan": "CONFIG|RUN", "submit": "CONFIG|RUN"}

INTRODUCTION = """Turn a pretrained transformer into a fast attention-Mamba hybrid by staged distillation.

  distill run demo                     the whole chain on the embedded teacher
  distill plan configs/apriel_h1_15b.yaml
  distill run my.yaml train.steps=500 schedule=[5,7]
  distill traces --teacher /models/my-llama --prompts questions.jsonl

CONFIG is a YAML file or the short name of one we ship; RUN is a folder that a run has written. Any key of
the config can be set after it as key=value. 'distill VERB --help' explains a verb."""


def docstring(module: str) -> str:
    """A module's docstring, read without importing it (imports take seconds)."""
    spec = util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in two lines, without the usage, which is a screenful of options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n'{self.prog} --help' says what is allowed\n")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and that of every verb; each verb's help is its file's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="distill", description=INTRODUCTION, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, module in VERBS.items():
        text = docstring(module)
        sub = verbs.add_parser(verb, help=text.splitlines()[0].rstrip("."), description=text, formatter_class=raw)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if verb in OPTIONS:
            OPTIONS[verb](sub)
            continue
        sub.add_argument("target", metavar=TARGETS.get(verb, "CONFIG|RUN"), help="what to work on (see above)")
        sub.add_argument(
            "overrides", metavar="key=value", nargs="*", default=[], help="config values set over the file's"
        )
        if verb in ("score", "place", "swap", "cache", "train"):
            sub.add_argument("--stage", help="H1-5, or its number; by default the first not done")
        if verb == "sft":
            sub.add_argument("--stage", help="H1-5, or its number; by default the last one that is distilled")
        if verb in ("run", "score", "place", "swap", "cache", "train", "sft"):
            sub.add_argument(
                "--force", action="store_true", help="redo what was made with other inputs, and what follows"
            )
        if verb == "score":
            sub.add_argument("--candidate", type=int, metavar="I", help="score the i-th remaining block (from 0) alone")
        if verb == "submit":
            sub.add_argument("--dry-run", action="store_true", help="print the SLURM scripts")
            sub.add_argument("--cluster", metavar="NAME", help="a file of configs/cluster, or a path")
    return parser, verbs.choices


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a verb; a wrong one ends the program with exit code 2, naming the nearest that is allowed."""
    parser, verbs = build_parser()
    if not argv:
        parser.error(f"which verb? {', '.join(VERBS)}")
    if not argv[0].startswith("-") and argv[0] not in VERBS:
        parser.error(f"unknown verb '{argv[0]}'{_nearest(argv[0], VERBS)}; verbs: {', '.join(VERBS)}")
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "targets"):  # they may stand after an option, too
        args.targets += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    for text in rest:
        if not hasattr(args, "overrides") or "=" not in text or text.startswith("-"):
            sub = verbs[args.verb]
            options = re.findall(r"--[a-z-]+", sub.format_help())
            sub.error(f"unknown argument '{text}'{_nearest(text.split('=')[0], options)}")
    if rest:
        args.overrides = [*args.overrides, *rest]  # key=value may stand after an option, too
    return args


def _nearest(given: str, allowed: Iterable[str]) -> str:
    """As ``distill.errors.nearest``, which takes seconds to import."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit code 0; 2 with one message for what the user can mend; 1 for a bug of ours."""
    args = parse(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code = 1
    try:
        code = attempt(args)
        return code
    finally:
        end_job(code)


def attempt(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code, after a message for what went wrong."""
    try:
        return perform(args)
    except KeyboardInterrupt as error:
        name = str(error) or "SIGINT"
        print(f"\ndistill {args.verb}: stopped by {name}; the same command continues", file=sys.stderr)
        return int(getattr(error, "exit_code", 128 + signal.SIGINT))
    except BrokenPipeError:  # who reads the output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails, too
        return 141
    except Exception as error:  # the one place that turns what went wrong into a message and an exit code
        from stages.failures import explain
        from stages.ranks import LOST, lost

        if args.debug:
            traceback.print_exc()
        if (gone := lost(error)) is not None:
            print(*[f"distill {args.verb}: {gone}"] * bool(gone), file=sys.stderr)
            return LOST
        code, text = explain(args.verb, error)
        print(f"distill {args.verb}: {text}", file=sys.stderr)
        return code


def perform(args: argparse.Namespace) -> int:
    """Do what was asked; imports come here, because they take seconds."""
    quiet()
    from distill import distributed, interrupt, lock, tracking
    from distill.storage import full_disk_named

    try:
        with interrupt.handled(), full_disk_named(Path.cwd()):
            if distributed.launched() and distributed.join().rank:
                return int(importlib.import_module("stages.ranks").follow())
            return int(importlib.import_module(VERBS[args.verb]).main(args))
    finally:
        lock.release()
        tracking.end()


def end_job(code: int) -> None:
    """Leave this process's job, if it has one; where it is the first, the others end with its exit code."""
    module = sys.modules.get("distill.distributed")  # whose import takes seconds, and is not needed to refuse a verb
    if module is not None and (job := module.job()) is not None:
        if job.rank == 0:
            job.end(code)
        job.leave()


def quiet() -> None:
    """Keep libraries' banners, bars and advice out of the output; their errors stay."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
