"""Train the embedded teacher from nothing on the embedded traces.

    distill pretrain teacher output=runs/teacher

CONFIG is a YAML file, or the short name of one we ship (``teacher``). Writes a Hugging Face folder (bf16
safetensors, tokenizer) with the recipe and the training log beside it. Interrupted, the same command continues
from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from distill.config import PretrainConfig, dump_config, load_config
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.data.traces import load_rows
from distill.trainer import LanguageTrainer, fit, training_arguments
from stages.common import config_path, set_threads


def main(args: argparse.Namespace) -> int:
    pretrain(load_config(PretrainConfig, config_path(args.target), args.overrides))
    return 0


def pretrain(config: PretrainConfig) -> Path:
    """Train the model that ``config`` describes; returns the folder written."""
    set_threads(config.threads)
    set_seed(config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **ids, **config.model))
    print(f"teacher: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} blocks")
    train = config.train
    rows = load_rows(
        config.data.source,
        tokenizer,
        train.steps * train.batch_size,
        config.data.sequence_length,
        config.data.mix,
        config.seed,
        mask=config.data.mask,
    )
    arguments = training_arguments(train, train.steps, output / "checkpoints", config.seed)
    fit(LanguageTrainer, model, rows, arguments, title="pretrain", log=output / "log.jsonl")
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "recipe.yaml").write_text(dump_config(config))
    print(f"wrote {output}")
    return output
