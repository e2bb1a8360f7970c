"""GGUF files where a verb measures models: alone as CHECKPOINTs, or in a run beside the stage that they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError
from distill.records import Step, write_json
from distill.schedule import Stage
from distill.teacher import load_model
from eval.backends import llama_cpp
from eval.backends.llama_cpp import LanguageModel, Model, is_gguf, kind_of, placement_of, read_config, read_tokenizer
from eval.backends.llama_runtime import File, check_file, check_installed
from stages.context import Context
from stages.identity import content

__all__ = ["config_of", "file_step", "found", "is_gguf", "language_model", "measured_beside", "tokenizer_of"]


def found(target: str) -> str:
    """The GGUF file that CHECKPOINT names; UserError where it cannot be opened here."""
    path = Path(target).expanduser()
    check_file(path)
    check_installed()
    return str(path)


def words_of(target: str) -> File:
    """The file without its weights."""
    return File(Path(target), words_only=True)


def config_of(target: str) -> Any:
    """The config of the hybrid in a file; UserError where it tells of none."""
    return read_config(words_of(target))


def tokenizer_of(target: str) -> Any:
    """The tokenizer of the hybrid in a file."""
    return read_tokenizer(words_of(target))


def language_model(target: str, dtype: str) -> LanguageModel:
    """The file, ready to be asked."""
    file = File(Path(target))
    return LanguageModel(file, read_config(file), torch.get_num_threads(), dtype)


def file_step(context: Context, stage: Stage, target: str) -> Step:
    """The step that measures a file in a run; UserError for a file of another stage."""
    file = words_of(target)
    config = read_config(file)
    mixers = context.placement(stage)["mixers"]
    if list(config.mixers) != mixers:
        raise UserError(
            f"{target} has {placement_of(config)[0]} of {len(config.mixers)} blocks replaced, and not those of "
            f"{stage.name}: name its own stage with --stage"
        )
    name = f"{stage.folder}-{kind_of(file)}"
    inputs = {
        "file": content(Path(target)),
        "seed": context.config.seed,
        "dtype": context.config.dtype,
        "measure": context.measured(),
    }
    return Step(f"gguf/{name}/measure", context.run_dir / "gguf" / name / "measure", inputs, {})


def measured_beside(
    context: Context, stage: Stage, target: str, spent: dict[str, Any], folder: Path, figures: Any
) -> None:
    """Measure a file beside the run's teacher, as ``figures`` does a model; ``spent`` is what its stage cost."""
    dtype = context.config.dtype
    asked = language_model(target, dtype)
    name = f"{stage.name}-{kind_of(asked.file)}"
    shape = llama_cpp.shape_of(asked.file, asked.config, dtype)
    engine = Model(name, asked.file, shape, torch.get_num_threads(), dtype)
    teacher = load_model(context.config.teacher, dtype)
    record = {"name": name, "replaced": stage.replaced, "num_blocks": stage.num_blocks, **spent, "backend": "llama.cpp"}
    found = figures(context, {"teacher": teacher, name: engine}, target, folder, asked)
    write_json(folder / "measure.json", {**record, **found})
