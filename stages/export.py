"""Export a hybrid to a form that other programs load without our code.

    distill export runs/demo_mamba2 --to hf-native --output granite
    distill export runs/demo_mamba2/stages/01-H1-5 --to gguf --output hybrid.gguf --dtype f16
    distill export --table

CHECKPOINT or RUN (of a run the last distilled stage, or --stage). hf-native is a GraniteMoeHybrid folder for
transformers, vLLM and SGLang; gguf is one file for llama.cpp, its tokenizer and chat template included (``pip install
'distill-hybrid[gguf]'``). What cannot be held is refused before anything is written, with the reason;
--table shows which teacher and mixer goes out to what.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill import export
from distill.errors import UserError
from distill.teacher import load_config
from stages.common import say
from stages.package import locate


def main(args: argparse.Namespace) -> int:
    if args.table:
        print(table())
        return 0
    if not (args.target and args.to and args.output):
        raise UserError(f"give CHECKPOINT or RUN, --to {'|'.join(export.available())} and --output DIR, or --table")
    form = export.target(args.to)
    options = {"dtype": args.dtype} if args.dtype else {}
    if options and args.to != "gguf":
        raise UserError(f"--dtype={args.dtype} is of a gguf; {args.to} has the checkpoint's own type")
    checkpoint, _ = locate(Path(args.target).expanduser(), args.stage)
    export.check(load_config(str(checkpoint)), args.to, checkpoint)
    output = Path(args.output).expanduser()
    tensors = form.export(checkpoint, output, **options)
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    say(f"{checkpoint} -> {output}: {args.to}, {len(tensors)} tensors, {size / 2**20:,.1f} MiB")
    return 0


def table() -> str:
    """Which teacher and mixer can be exported to what, as Markdown."""
    rows = export.support_table()
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
