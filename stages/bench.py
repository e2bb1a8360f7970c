"""Measure how fast models decode, what they hold, and what this machine would allow; or predict it from their shapes.

    distill bench embedded runs/demo
    distill bench embedded runs/demo/stages/01-H1-5/train/checkpoint --batches 1,32 --output-tokens 4096 --output b.json
    distill bench --shape configs/apriel_h1_15b.yaml --h 0,25,30,40 --device h100

CHECKPOINT (a folder with config.json, a stage's folder, a hub name, embedded, or a GGUF file, which llama.cpp runs) or
RUN (its teacher and its distilled stages), one or more; the first is what the others are compared with. They are
measured in one process and take turns.

Step times over batch and context; 1 token in, N out; prefill; memory by length of a sequence. Two protocols: equal
batch, and each model at its largest batch within the same memory. Beside each speed stands, in brackets, which part
of the operator roofline of this machine it reaches. The record, JSON, goes to the file that --output names; without
it, it is the last line of output, unless that is a terminal.

With --shape no weights are needed: models of random weights are measured where they fit on a GPU (or are small);
elsewhere, and with --device, the roofline of a device predicts. N = 16,384 as in the paper.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distill.config import RunConfig, ThroughputConfig
from distill.errors import UserError, choose
from distill.mixers import available, set_kernels
from distill.records import write_json
from distill.teacher import DTYPES, load_config, resolve, trust_code
from eval import serving, shapes, throughput
from eval.backends import NAMES, backend
from eval.machine import THIS, free_memory, named
from eval.roofline import shapes_of
from eval.runs import read_run
from stages import gguf_files
from stages.checkpoints import checkpoint, names
from stages.common import say, set_threads
from stages.package import place
from stages.plan import teacher_config
from stages.targets import is_run, read_config

ROOFLINE = "roofline"
MEASURED = ("quartiles", "roofline", "of rooflines")
"""Columns that say nothing of a prediction."""
FITS = 0.75  # of the free memory, for weights: the rest is for caches
SMALL = 200e6  # parameters of a shape that is measured without a GPU


def main(args: argparse.Namespace) -> int:
    options, dtype = options_of(args), dtype_of(args.dtype)
    set_threads(args.threads)
    record = of_shape(args, options, dtype) if args.shape else of_checkpoints(args, options, dtype)
    record = {"dtype": dtype, "threads": torch.get_num_threads(), "output_tokens": options.output_tokens, **record}
    for title, table in tables(record):
        say(f"\n{title}\n{table}")
    if args.output:
        write_json(Path(args.output).expanduser(), record)
        say(f"\nrecord: {args.output}")
    elif sys.stdout.isatty():
        say("\nrecord: not kept; --output names a file for it")
    else:
        say("")
        print(json.dumps(record))
    return 0


def options_of(args: argparse.Namespace) -> ThroughputConfig:
    """What to measure; UserError for numbers that mean nothing."""
    options = ThroughputConfig(
        batches=numbers("--batches", args.batches),
        contexts=numbers("--contexts", args.contexts),
        repeats=args.repeats,
        output_tokens=args.output_tokens,
        full=args.full,
        memory_gb=args.memory_gb,
        prefill_tokens=args.prefill_tokens,
        lengths=numbers("--lengths", args.lengths),
    )
    if options.output_tokens < 2:
        raise UserError(f"--output-tokens={options.output_tokens} must be at least 2: N of 1 token in, N out")
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats} must be at least 1")
    if not 0 <= options.memory_gb < float("inf"):
        raise UserError(f"--memory-gb={options.memory_gb} must be a number of GB, or 0")
    if args.output and Path(args.output).expanduser().is_dir():
        raise UserError(f"--output={args.output} is a folder: name the JSON file to write")
    if bool(args.shape) == bool(args.targets):
        raise UserError("give CHECKPOINTs or RUNs to measure, or --shape CONFIG, and not both")
    choose("backend", args.backend, NAMES)
    for option in ("h", "mixers"):
        if getattr(args, option) and not args.shape:
            raise UserError(
                f"--{option} is of hybrids of a shape, and needs --shape CONFIG; checkpoints are as they are"
            )
    if args.device:
        named_only(args.device)
        if not args.shape:
            raise UserError("--device predicts, and needs --shape CONFIG; checkpoints are measured on this machine")
    return options


def named_only(device: str) -> None:
    """Refuse a device that there is not, before this one is measured."""
    from eval.machine import DEVICES

    choose("device", device.lower(), [THIS, *DEVICES])


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """``1,32`` as numbers; UserError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and least <= int(part) < 2**31 for part in parts):
        raise UserError(f"{option}={text} must be whole numbers from {least} on, with commas between them: 1,32")
    return list(dict.fromkeys(int(part) for part in parts))


def make_room(output: str) -> None:
    """Make the folder of the record before anything is measured for it; UserError where that cannot be."""
    folder = Path(output).expanduser().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output={output}: {folder} cannot be written to")


def dtype_of(given: str) -> str:
    """The type asked for, or what a device computes in by habit."""
    if given:
        return choose("dtype", given, DTYPES)
    return "bfloat16" if torch.cuda.is_available() else "float32"


def sources_of(targets: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name -> (what to load, kernels) of every model that the targets name."""
    found: dict[str, tuple[str, str]] = {}
    for target in targets:
        if is_run(target):
            config = read_config(target, [])
            run = read_run(Path(config.run_dir).expanduser())
            trust_code(config.teacher, config.trust_remote_code)
            models = {"teacher": config.teacher}
            models |= {m.name: str(place(run, m)) for m in run.models if (place(run, m) / "config.json").is_file()}
            kernels = config.kernels
        else:
            models, kernels = {names([target])[0]: checkpoint(target)}, "auto"
        for name, source in models.items():
            if source in [known for known, _ in found.values()]:
                continue
            number = sum(each.split(" (")[0] == name for each in found)
            found[f"{name} ({number + 1})" if number else name] = source, kernels
    for source, _ in found.values():  # before any weight is read
        if gguf_files.is_gguf(source):
            gguf_files.config_of(source)
        else:
            load_config(resolve(source), convertible=False)
    return found


def of_checkpoints(args: argparse.Namespace, options: ThroughputConfig, dtype: str) -> dict[str, Any]:
    """Measure the checkpoints that the command line names."""
    module = backend(args.backend)
    module.check_installed()
    engines, sources = {}, sources_of(args.targets)
    make_room(args.output)
    longest = max(*options.contexts, options.output_tokens)
    for name, (source, kernels) in sources.items():
        say(f"loading {name}")
        opened_by = backend("llama.cpp") if gguf_files.is_gguf(source) else module
        engines[name] = opened_by.open_model(source, name, dtype, models=len(sources), length=longest)
        if hasattr(engines[name], "model"):
            set_kernels(engines[name].model, kernels)
    return {"backend": args.backend, **measured(engines, options)}


def measured(models: dict[str, Any], options: ThroughputConfig) -> dict[str, Any]:
    """``throughput`` and ``serving`` of models, in turns."""
    engines = throughput.engines_of(models)
    say(str(throughput.machine_of(engines)))
    rows = throughput.measure(engines, options, say)
    return {"throughput": rows, "serving": serving.details(engines, rows, options, say)}


def of_shape(args: argparse.Namespace, options: ThroughputConfig, dtype: str) -> dict[str, Any]:
    """Measure models of random weights, or predict them."""
    config: RunConfig = read_config(args.shape, [])
    teacher = teacher_config(config)
    blocks = shapes.check_blocks(numbers("--h", args.h or "0", 0), teacher.num_hidden_layers)
    mixers = [choose("mixer", name.strip(), available()) for name in (args.mixers or "mamba1,mamba2").split(",")]
    if not args.dtype and args.device not in ("", THIS):
        dtype = "bfloat16"  # what the figures of named devices are for
    width = DTYPES[dtype].itemsize
    every = shapes_of(teacher, blocks, mixers, config.mixer, width)
    make_room(args.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    each_block = sum(shape.weight_bytes - every["teacher"].weight_bytes for shape in every.values())
    needed = every["teacher"].weight_bytes * 1.1 + max(each_block, 0)
    small = device == "cuda" or every["teacher"].parameters <= SMALL
    if args.device in ("", THIS) and small and needed < FITS * free_memory(device):
        say(f"{teacher.model_type} of {every['teacher'].parameters / 1e6:,.0f} M parameters, random weights, {dtype}")
        models = shapes.random_models(teacher, blocks, mixers, config.mixer, DTYPES[dtype], device)
        return {"shape": args.shape, "backend": "hf", "dtype": dtype, **measured(models, options)}
    machine = named(args.device or THIS, DTYPES[dtype])
    say(f"predicted from the roofline of {machine}, weights of {width} bytes; nothing is measured")
    record = shapes.predicted(teacher, blocks, mixers, config.mixer, options, machine, width)
    return {"shape": args.shape, "backend": ROOFLINE, "dtype": dtype, **record}


def tables(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, text) of what a record says, for a terminal."""
    found, details = [], record["serving"]
    guessed = record["backend"] == ROOFLINE
    part = lambda row: "" if guessed else f"({row['roofline_fraction']:.2f})"  # noqa: E731
    steps: dict[tuple[int, int], dict[str, str]] = {}
    for row in record["throughput"]:
        line = steps.setdefault(
            (row["batch"], row["context"]), {"batch": row["batch"], "context": f"{row['context']:,}"}
        )
        line[row["model"]] = f"{1e3 * row['step_seconds']:,.2f} {part(row)}"
    reached = "" if guessed else " (and the part of the roofline reached)"
    found.append((f"decode step, ms{reached}", plain(list(steps.values()))))
    speeds = [
        {
            "protocol": row["protocol"].replace("_", " "),
            "model": row["model"],
            "batch": row["batch"],
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "quartiles": f"{row['tokens_per_second_low']:,.0f} - {row['tokens_per_second_high']:,.0f}",
            "roofline": part(row),
            "ratio": times(row["ratio"]),
            "of rooflines": times(row["roofline_ratio"]),
            "how": row["how"],
        }
        for row in details["one_in_n_out"]
    ]
    tokens = record["output_tokens"]
    if guessed:
        speeds = [{key: value for key, value in row.items() if key not in MEASURED} for row in speeds]
    found.append((f"1 in, {tokens:,} out (ratio: to the first model)", plain(speeds)))
    if details["prefill"]:
        rows = [
            {
                "model": row["model"],
                "batch": row["batch"],
                "tokens": f"{row['tokens']:,}",
                "first token, ms": f"{1e3 * row['seconds']:,.1f}",
                "tokens/s": f"{row['tokens_per_second']:,.0f}",
                "roofline": part(row),
            }
            for row in details["prefill"]
        ]
        rows = [{key: value for key, value in row.items() if not guessed or key not in MEASURED} for row in rows]
        found.append(("prefill", plain(rows)))
    lengths: dict[str, dict[str, str]] = {}
    for row in details["memory"]:
        mark = "" if row["measured"] else "*"
        lengths.setdefault(row["model"], {"model": row["model"]})[f"{row['tokens']:,}"] = (
            f"{row['total_bytes'] / 2**20:,.1f} ({(row['kv_bytes'] + row['state_bytes']) / 2**20:,.1f}){mark}"
        )
    found.append(("memory of one sequence by its length, MiB (cache alone; * computed)", plain(list(lengths.values()))))
    lines = [
        f"a block is faster with {mixer} than with attention from context {', '.join(pays(each))} on"
        for mixer, each in details["pays_from"].items()
    ]
    return [*found, ("by the roofline", "\n".join(lines))] if lines else found


def times(ratio: float | None) -> str:
    """``2.10x``; a dash where the first model has no speed to compare with."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def pays(each: dict[str, int | None]) -> list[str]:
    """``512 (batch 1)`` for every batch."""
    return [f"{'none' if context is None else f'{context:,}'} (batch {batch})" for batch, context in each.items()]


def plain(rows: list[dict[str, Any]]) -> str:
    """Rows as a table of text."""
    return pd.DataFrame(rows).fillna("").to_string(index=False)
