"""Widen a Llama without changing what it computes: twice the hidden size, the heads and the MLP.

    python benchmarks/widen.py embedded --output runs/wide_teacher

llama.cpp's K and I types quantise blocks of 256 weights, and the embedded teacher's rows hold 128: most of its tensors
would fall back to other types. Here every channel stands twice; what reads two copies gets half of each weight plus
and minus noise of the same size, and the residual stream is turned by a random rotation, so that the weights look like
those of any other model of that width. The same tokens get the same logits up to rounding, which is checked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.errors import UserError
from distill.teacher import load_model, load_tokenizer
from stages.cli import quiet

CHECKED = 1e-3
"""Largest difference of logits from the given model's, relative to the largest logit."""


def both(rows: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """[R, C] -> [2 R, C]: each of ``groups`` groups of rows twice in a row."""
    return rows.unflatten(0, (groups, -1)).repeat_interleave(2, 0).flatten(0, 1)


def halves(columns: torch.Tensor, generator: torch.Generator, groups: int = 1) -> torch.Tensor:
    """[R, C] -> [R, 2 C] that gives the same for an input whose groups of channels stand twice in a row."""
    given = columns.unflatten(1, (groups, -1)) / 2
    noise = torch.randn(given.shape, generator=generator) * given.std()
    return torch.stack([given + noise, given - noise], 2).flatten(1)


@torch.no_grad()
def widen(model: Any, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of twice the width that computes what ``model`` does; its norms are folded into what follows them."""
    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise UserError("only a Llama without biases can be widened")
    keys = config.to_dict()
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        keys[name] *= 2
    wide = LlamaForCausalLM(LlamaConfig(**{**keys, "tie_word_embeddings": False, "dtype": "float32"})).eval()
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(2 * config.hidden_size, 2 * config.hidden_size, generator=generator))[0]
    groups = config.num_key_value_heads

    def reader(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return halves(weight * norm, generator) @ turn.T

    def writer(weight: torch.Tensor) -> torch.Tensor:
        return turn @ both(weight)

    wide.model.embed_tokens.weight.copy_(writer(model.model.embed_tokens.weight.T).T)
    wide.lm_head.weight.copy_(reader(model.lm_head.weight, model.model.norm.weight))
    for new, old in zip(wide.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = reader(getattr(old.self_attn, name).weight, old.input_layernorm.weight)
            getattr(new.self_attn, name).weight.copy_(both(rows, groups))
        new.self_attn.o_proj.weight.copy_(writer(halves(old.self_attn.o_proj.weight, generator, groups)))
        for name in ("gate_proj", "up_proj"):
            rows = reader(getattr(old.mlp, name).weight, old.post_attention_layernorm.weight)
            getattr(new.mlp, name).weight.copy_(both(rows))
        new.mlp.down_proj.weight.copy_(writer(halves(old.mlp.down_proj.weight, generator)))
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="embedded, or a folder with a Llama")
    parser.add_argument("--output", required=True, help="the folder to write")
    args = parser.parse_args()
    quiet()
    model, tokenizer = load_model(args.teacher, "float32", device="cpu"), load_tokenizer(args.teacher)
    wide = widen(model)
    ids = torch.randint(5, model.config.vocab_size, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = wide(ids).logits, model(ids).logits
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if difference > CHECKED:
        raise SystemExit(f"the wide model differs by {difference:.1e} of the largest logit")
    wide.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(
        f"{args.output}: {model.num_parameters():,} -> {wide.num_parameters():,} parameters, width "
        f"{wide.config.hidden_size}; logits differ by {difference:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
