"""Train the embedded teacher from nothing on the embedded traces.

    distill pretrain teacher output=runs/teacher

CONFIG is a YAML file, or the short name of one we ship (``teacher``; ``teacher_small``, of another family). Writes a
Hugging Face folder (bf16 safetensors, tokenizer) with the recipe, the training log and the held-out scores beside it.
Interrupted, the same command continues from the newest checkpoint; finished, it prints the scores, which it measures
again where scores.json was removed.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from distill.config import MeasureConfig, PretrainConfig
from distill.config_merge import dump_config, load_config
from distill.data.mixture import check_data, load_data
from distill.data.tokenizer import build_tokenizer
from distill.errors import UserError
from distill.lock import hold
from distill.records import differences, read_json, write_json, write_text
from distill.storage import full_disk_named, sync, sync_tree
from distill.teacher import check_files, load_model, load_tokenizer
from distill.teacher import load_config as load_model_config
from distill.trainer import LanguageTrainer, fit, training_arguments
from eval import accuracy
from eval.scores import Scores
from eval.wellformed import problem
from stages.common import say, set_threads
from stages.targets import check_pretrain, config_path, model_config


def main(args: argparse.Namespace) -> int:
    pretrain(load_config(PretrainConfig, config_path(args.target), args.overrides))
    return 0


def pretrain(config: PretrainConfig) -> Path:
    """Train the model that ``config`` describes, unless its folder holds it already, and score it; returns the
    folder.

    Raises UserError where the data cannot be had, or the folder holds a model of another recipe.
    """
    check_pretrain(config)
    check_data(config.data, build_tokenizer)
    output = Path(config.output).expanduser()
    if config.start and not (output / "model.safetensors").is_file():
        load_model_config(config.start, convertible=False)
        check_files(config.start)
    settle_recipe(config, output)
    if (output / "model.safetensors").is_file():
        say(f"{output} holds the trained model: nothing is trained")
    else:
        train(config, output)
    for line in score(output).lines():
        say(line)
    return output


def settle_recipe(config: PretrainConfig, output: Path) -> None:
    """Write the resolved config to ``recipe.yaml``, or check that the one there is equal. Keys that it lacks have
    their defaults, and the number of threads is the one it began with unless ``config`` names one."""
    recipe = output / "recipe.yaml"
    if recipe.is_file():
        begun = load_config(PretrainConfig, recipe)
        config.threads = config.threads or begun.threads
        old, new = asdict(begun), asdict(config)
        if changed := differences({**old, "output": ""}, {**new, "output": ""}):
            lines = "\n  ".join(changed[:3])
            raise UserError(f"{recipe} is another recipe:\n  {lines}\nchoose another output, or remove {output}")
    elif (output / "model.safetensors").is_file():
        raise UserError(f"{output} holds a model without its recipe.yaml: choose another output")
    config.threads = set_threads(config.threads)
    if not recipe.is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_text(recipe, dump_config(config))


def train(config: PretrainConfig, output: Path) -> None:
    """Train, and write the model as bf16: its weights last, so that where they are all else is too."""
    hold(output / "train.lock", str(output))
    set_seed(config.seed)
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    if config.start:
        model = load_model(config.start).train()
    else:
        model = AutoModelForCausalLM.from_config(model_config(config.model, **ids))
    say(f"teacher: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks")
    options = config.train
    rows = load_data(config.data, tokenizer, options.steps * options.batch_size, config.seed)
    arguments = training_arguments(options, options.steps, output / "checkpoints", config.seed)
    fit(LanguageTrainer, model, rows, arguments, title="pretrain", log=output / "log.jsonl")
    (output / "scores.json").unlink(missing_ok=True)  # of weights that were there before
    tokenizer.save_pretrained(output)
    partial = output / "model.partial"
    with full_disk_named(output):
        model.to(torch.bfloat16).save_pretrained(partial)
        sync_tree(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "model.safetensors"):
        os.replace(file, output / file.name)
    sync(output)
    partial.rmdir()
    say(f"wrote {output}")


def score(output: Path) -> Scores:
    """The held-out scores of the model in ``output``: from ``scores.json``, or measured and written there."""
    path = output / "scores.json"
    if not path.is_file():
        model, tokenizer = load_model(str(output)), load_tokenizer(str(output))
        scores = accuracy.evaluate(model, tokenizer, MeasureConfig(batch_size=100))
        write_json(path, scores.record)
    record: Any = read_json(path)
    known = isinstance(record, dict) and record.keys() == {"accuracy", "by_distance"}
    if not known or problem("measure", {**record, "throughput": []}):
        raise UserError(f"{path} is in another form: remove it, and the same command measures again")
    return Scores(record["accuracy"], record["by_distance"])
