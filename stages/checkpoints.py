"""Accuracy of any models, one after the other, with the tasks of one config: ``distill measure CHECKPOINT...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import set_seed

from distill.config import RunConfig
from distill.data.sources import HUB_NAME
from distill.errors import UserError, nearest
from distill.mixers import ATTENTION, set_kernels
from distill.posttrain.merge import checkpoint_folder
from distill.records import fingerprint, provenance, read_json, write_json
from distill.teacher import (
    EMBEDDED,
    check_files,
    check_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    trust_code,
)  # fmt: skip
from eval import accuracy
from eval.scores import COUNTS
from eval.suites import task_manager
from eval.wellformed import problem
from stages import gguf_files
from stages.common import say, set_threads
from stages.identity import content, identity, tokenizers_differ
from stages.targets import default_config, read_config, shipped_configs

INNER = ("checkpoint", "train", "merge", "steps")
"""Folders within a stage's, that do not tell which model it is."""


def main(targets: Sequence[str], args: argparse.Namespace) -> int:
    if args.stage is not None:
        raise UserError(f"--stage is of a RUN, and {targets[0]} is a CHECKPOINT: name the stage's own folder")
    config = read_config(args.config, args.overrides) if args.config else default_config(args.overrides)
    if not config.measure.generative and not config.measure.multiple_choice:
        raise UserError("measure.generative and measure.multiple_choice are empty: name a task to score")
    set_threads(config.threads)
    models = {name: checkpoint(target) for name, target in zip(names(targets), targets, strict=True)}
    accuracy.check(config.measure)
    wanted = {name: inputs(model, config) for name, model in models.items()}
    output = Path(args.output).expanduser() if args.output else None
    records = earlier(output, wanted, force=args.force) if output else {}
    first, *others = models
    for name in others:
        if which := tokenizers_differ(models[name], models[first], tokenizer_of):
            say(f"note: the tokenizer of {name} is not that of {first}: {which}; a hybrid has its teacher's")
    for name, model in models.items():
        if records.get(name, {}).get("fingerprint") == fingerprint(wanted[name]):
            say(f"{name}: is in {output} already")
            continue
        records[name] = score(name, model, config, wanted[name])
        if output:
            write_json(output, list(records.values()))
    say("\n" + table([records[name] for name in models]))
    if output:
        say(f"\nrecords: {output}")
    return 0


def checkpoint(target: str) -> str:
    """The model that CHECKPOINT names: ``embedded``, a hub name, the folder with config.json (also a stage's), or a
    GGUF file."""
    if target == EMBEDDED:
        return target
    if gguf_files.is_gguf(target):
        return gguf_files.found(target)
    if Path(target).expanduser().is_dir():
        return str(checkpoint_folder(target))
    if HUB_NAME.fullmatch(target) and not Path(target).expanduser().parent.is_dir():
        return target
    raise UserError(
        f"no checkpoint '{target}'{nearest(target, [EMBEDDED, *shipped_configs()])}: give a folder with config.json, "
        f"a stage's folder, a hub name (owner/name) or {EMBEDDED}; or a CONFIG or RUN"
    )


def tokenizer_of(model: str) -> Any:
    """The tokenizer of what ``checkpoint`` found."""
    return gguf_files.tokenizer_of(model) if gguf_files.is_gguf(model) else load_tokenizer(model)


def names(targets: Sequence[str]) -> list[str]:
    """A short name for each target: the folder that tells which it is, or all of it where two would have the same."""
    short = []
    for target in targets:
        parts = [part for part in Path(target).parts if part not in INNER] or [target]
        short.append(target if HUB_NAME.fullmatch(target) and not Path(target).exists() else parts[-1])
    return [target if short.count(name) > 1 else name for name, target in zip(short, targets, strict=True)]


def inputs(model: str, config: RunConfig) -> dict[str, Any]:
    """What decides a model's figures, everything about it checked before any is scored."""
    measure = config.measure
    tasks = [*measure.generative, *measure.multiple_choice]
    embedded = any(task.startswith("embedded_") for task in tasks if task in task_manager([]).all_tasks)
    options = {key: value for key, value in asdict(measure).items() if key not in UNREAD}
    if gguf_files.is_gguf(model):
        gguf_files.config_of(model)
        which = content(Path(model))
    else:
        trust_code(model, config.trust_remote_code)
        shape = load_config(model, convertible=False)
        check_files(model)
        check_tokenizer(model, shape.vocab_size, chats=embedded)
        which = identity(model, shape)
    return {
        "model": which,
        "measure": options,
        "seed": config.seed,
        "dtype": config.dtype,
        "kernels": config.kernels,
    }


NONE = "-"
UNREAD = ("allow_code_execution", "local_data", "throughput", "batch_size")
"""Keys of ``measure`` that change no answer."""


def earlier(output: Path, wanted: dict[str, dict[str, Any]], *, force: bool) -> dict[str, Any]:
    """The records that ``output`` holds, by name. UserError for a file of another kind, and for records of the same
    names that were made with other settings, unless ``force`` replaces them."""
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(
            f"--output {output} " + ("is a folder" if output.is_dir() else f"has no folder {output.parent}")
        )
    if not output.is_file():
        return {}
    found = read_json(output)
    if not isinstance(found, list) or any(problem("measure", each) or "name" not in each for each in found):
        raise UserError(f"--output {output} exists and holds no records of 'distill measure': name another file")
    records = {each["name"]: each for each in found}
    for name, values in wanted.items():
        if name in records and records[name].get("fingerprint") != fingerprint(values):
            if not force:
                raise UserError(
                    f"{output} holds '{name}' measured as another model or with other settings: name another --output, "
                    "or use --force to replace it"
                )
            del records[name]
    return records


def score(name: str, checkpoint: str, config: RunConfig, made_with: dict[str, Any]) -> dict[str, Any]:
    """Score one model on all tasks; returns its record."""
    say(f"{name}: measuring accuracy")
    set_seed(config.seed)
    stored = gguf_files.is_gguf(checkpoint)
    model: Any = (
        gguf_files.language_model(checkpoint, config.dtype)
        if stored
        else load_model(checkpoint, config.dtype, convertible=False)
    )
    mixers = list(getattr(model.config, "mixers", None) or [])
    if mixers and not stored:
        set_kernels(model, config.kernels)
    scores = accuracy.evaluate(
        model, tokenizer_of(checkpoint), config.measure, seed=config.seed, name=f"{name} ({checkpoint})", report=say
    )
    for line in scores.lines():
        say(line)
    return {
        "name": name,
        "checkpoint": checkpoint,
        "replaced": sum(mixer != ATTENTION for mixer in mixers),
        "num_blocks": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        **scores.record,
        "throughput": [],
        "fingerprint": fingerprint(made_with),
        "inputs": made_with,
        "provenance": provenance(),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Tasks down, models across, in per cent with one standard error; then the counts that are not 0."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for row in record["accuracy"]:
            cells[row["task"], record["name"]] = row
    models = [record["name"] for record in records]
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lines = [["task", *models]]
    for task in tasks:
        rows = [cells.get((task, model)) for model in models]
        figures = [f"{100 * row['value']:.1f} ± {100 * row['stderr']:.1f}" if row else NONE for row in rows]
        lines.append([task, *figures])
        for key, called in COUNTS.items():
            if any(row and row.get(key) for row in rows):
                lines.append([f"  {called}", *(str(row.get(key, 0)) if row else NONE for row in rows)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in row).rstrip()
        for row in (enumerate(zip(line, widths, strict=True)) for line in ruled)
    )
