"""Train the embedded teacher from nothing on the embedded traces.

    distill pretrain teacher output=runs/teacher

CONFIG is a YAML file, or the short name of one we ship (``teacher``). Writes a Hugging Face folder (bf16
safetensors, tokenizer) with the recipe, the training log and the held-out scores beside it. Interrupted, the
same command continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from distill.config import PretrainConfig, dump_config, load_config
from distill.data.mixture import check_data, load_data
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.errors import UserError
from distill.records import write_json, write_text
from distill.teacher import load_model
from distill.trainer import LanguageTrainer, fit, training_arguments
from eval import accuracy
from stages.common import say, set_threads
from stages.targets import config_path


def main(args: argparse.Namespace) -> int:
    pretrain(load_config(PretrainConfig, config_path(args.target), args.overrides))
    return 0


def pretrain(config: PretrainConfig) -> Path:
    """Train the model that ``config`` describes; returns the folder written."""
    check_data(config.data)
    set_threads(config.threads)
    set_seed(config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    recipe = output / "recipe.yaml"
    if recipe.is_file() and load_config(PretrainConfig, recipe) != config:
        raise UserError(f"{recipe} is another recipe: choose another output, or remove {output}")
    write_text(recipe, dump_config(config))
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    if config.start:
        model = load_model(config.start).train()
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **ids, **config.model))
    say(f"teacher: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks")
    train = config.train
    rows = load_data(config.data, tokenizer, train.steps * train.batch_size, config.seed)
    arguments = training_arguments(train, train.steps, output / "checkpoints", config.seed)
    fit(LanguageTrainer, model, rows, arguments, title="pretrain", log=output / "log.jsonl")
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    scores = accuracy.evaluate(
        model.float().eval(), tokenizer, ["embedded_generative"], ["embedded_choice"], batch_size=100
    )
    write_json(output / "scores.json", scores)
    for row in scores:
        say(f"  {row['task']:18s} {row['metric']} {100 * row['value']:5.1f}% +- {100 * row['stderr']:.1f}")
    say(f"wrote {output}")
    return output
