"""Make a GGUF smaller: llama.cpp's own quantisation, with an importance matrix from the run's data.

    distill quantize runs/demo_mamba2 --to Q4_K_M --output hybrid.gguf
    distill quantize runs/demo_mamba2/stages/01-H1-5 --to Q8_0,Q4_K_M,IQ3_M --output hybrid.gguf --only mamba
    distill quantize hybrid-f32.gguf --to Q6_K --output hybrid-q6.gguf --imatrix hybrid.imatrix.gguf

GGUF (in F32, F16 or BF16), CHECKPOINT or RUN, which is exported first. Of a RUN, of a CHECKPOINT in one and with
--data, the importance of every column is measured on training rows, written to NAME.imatrix.gguf beside the output and
used; --imatrix reads it from a file, or with 'none' does without. Several types give a file each, NAME-TYPE.gguf.
--only quantises one component of the blocks (mamba, attention, mlp) and leaves the rest as it was. Types, from the
most bits to the fewest: Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S
IQ3_M IQ3_S IQ3_XS* IQ3_XXS* Q2_K Q2_K_S* IQ2_M* IQ2_S* IQ2_XS* IQ2_XXS* TQ2_0 TQ1_0 IQ1_M* IQ1_S* (*: only
with an importance matrix).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import export
from distill.config import RunConfig
from distill.data.mixture import describe, load_data
from distill.data.traces import pad_id
from distill.errors import UserError, check_whole, choose
from distill.export import gguf, imatrix
from distill.export.quantize import COMPONENTS, NEED_MATRIX, Quantized, kind_of, library, quantize
from distill.storage import check_fresh
from distill.teacher import load_config, load_model, load_tokenizer
from stages.common import say, set_threads
from stages.package import locate
from stages.targets import read_config

NONE = "none"
ROWS_SEED = 90_003
"""Which training rows the importance is measured on."""
BATCH = 8192
"""Tokens that the checkpoint is given at a time."""


@dataclass(frozen=True)
class Source:
    """What is quantised: a GGUF, or a checkpoint, with the config of the data that its importance is measured on."""

    gguf: Path | None
    checkpoint: Path | None
    data: RunConfig | None


def main(args: argparse.Namespace) -> int:
    kinds = [kind_of(name) for name in args.to.split(",")]
    if args.only is not None:
        choose("component", args.only, COMPONENTS)
    if args.data and args.imatrix:
        raise UserError("--data says where the importance is measured, --imatrix where it is read: give one of them")
    outputs = files(Path(args.output).expanduser(), kinds)
    threads = set_threads(check_whole("--threads", args.threads))
    check_whole("--tokens", args.tokens, 1)
    library()
    source = find(args)
    matrix_file = outputs[0].with_name(f"{Path(args.output).stem}.imatrix.gguf")
    measured = source.data is not None and not args.imatrix
    for path in outputs:
        check_fresh(path)
    if measured and matrix_file.exists():
        raise UserError(f"{matrix_file} exists already: take it with --imatrix {matrix_file}, or remove it")
    if needing := [kind for kind in kinds if kind in NEED_MATRIX and not measured and args.imatrix in (None, NONE)]:
        raise UserError(
            f"{needing[0]} needs an importance matrix: quantise a RUN, a CHECKPOINT with --data, or give --imatrix FILE"
        )
    matrix = imatrix.read_matrix(Path(args.imatrix).expanduser()) if args.imatrix not in (None, NONE) else None
    with plain(source, outputs[0].parent) as path:
        if measured:
            matrix = measure(source, args.tokens)
            imatrix.write_matrix(matrix, matrix_file)
        say(f"importance: {matrix.tokens:,} tokens of {matrix.source}" if matrix else "importance: every column alike")
        columns = matrix.columns if matrix else None
        for kind, output in zip(kinds, outputs, strict=True):
            done = quantize(path, output, kind, matrix=columns, only=args.only, threads=threads)
            for line in told(done):
                say(line)
    return 0


def files(output: Path, kinds: Sequence[str]) -> list[Path]:
    """Where each type goes; UserError for a name that is no GGUF's, and a type given twice."""
    if output.suffix != ".gguf":
        raise UserError(f"--output {output} must end in .gguf")
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise UserError(f"--to names {twice[0]} twice")
    return [output] if len(kinds) == 1 else [output.with_name(f"{output.stem}-{kind}.gguf") for kind in kinds]


def find(args: argparse.Namespace) -> Source:
    """What the command line names, checked."""
    target = Path(args.target).expanduser()
    if target.is_file():
        if args.data or args.stage:
            raise UserError(
                f"--{'data' if args.data else 'stage'} goes with a CHECKPOINT or RUN, and {target} is a file: the "
                "importance is measured on the checkpoint, and read from --imatrix FILE"
            )
        return Source(target, None, None)
    if not target.is_dir():
        raise UserError(f"no file or folder {target}: give a GGUF, a CHECKPOINT or a RUN")
    checkpoint, run = locate(target, args.stage)
    export.check(load_config(str(checkpoint)), "gguf", checkpoint)
    data = args.data or (str(run.path) if run is not None else "")
    return Source(None, checkpoint, read_config(data, []) if data and args.imatrix is None else None)


@contextmanager
def plain(source: Source, folder: Path) -> Iterator[Path]:
    """The GGUF to quantise; that of a checkpoint lies in ``folder`` for as long as it is needed."""
    if source.gguf is not None:
        yield source.gguf
        return
    assert source.checkpoint is not None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize.", suffix=".partial", dir=folder) as scratch:
        path = Path(scratch) / "plain.gguf"
        gguf.export(source.checkpoint, path)
        yield path


def measure(source: Source, tokens: int) -> imatrix.Matrix:
    """The importance matrix of a checkpoint on ``tokens`` tokens of training rows."""
    assert source.checkpoint is not None and source.data is not None
    data = source.data.data
    tokenizer = load_tokenizer(str(source.checkpoint))
    rows = load_data(data, tokenizer, -(-tokens // data.sequence_length), ROWS_SEED)
    model: Any = load_model(str(source.checkpoint), source.data.dtype)
    say(f"measuring the importance of columns on {tokens:,} tokens of {describe(data)}")
    batch = max(BATCH // data.sequence_length, 1)
    return imatrix.measure(model, rows, describe(data), batch_size=batch, pad=pad_id(tokenizer))


def told(done: Quantized) -> list[str]:
    """What was written, in a line, and a second one where rows did not fit the type."""
    size = done.path.stat().st_size / 2**20
    types = ", ".join(f"{count} {name}" for name, count in done.types.items())
    lines = [f"{done.path}: {done.kind}, {size:,.2f} MiB, {done.bits:.2f} bits a weight; tensors: {types}"]
    if done.narrow:
        names = ", ".join(sorted({tensor.type for tensor in done.narrow}))
        widths = ", ".join(str(width) for width in sorted({tensor.columns for tensor in done.narrow}))
        lines.append(
            f"  note: rows of {widths} are no multiple of 256, so that {len(done.narrow)} tensors fell back to {names}"
        )
    return lines
