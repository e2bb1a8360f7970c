"""1 token in, N out: run to the end, and integrated from step times at a few contexts of a synthetic cache.

    python benchmarks/one_in_n_out.py --threads 2

A Llama of random weights whose keys and values, at the end of N tokens at the batch given, are at least twice its
weights, and its hybrid with half of the blocks replaced. The two ways agree only if the time of a step depends on the
context as the integral says. They are taken in turns, so that a drift of the machine meets both: a step of the
generation, then one at a sampled context beside it. Prints both, and how far they are apart (at most 5% is asked); the
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from bisect import bisect_left
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig

from distill.config import MixerConfig, ThroughputConfig
from eval.backends.hf import Model
from eval.shapes import random_models
from eval.throughput import contexts_of, one_in_n_out

LAYERS = 4
SHAPE = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip


def both_ways(name: str, model: Model, batch: int, tokens: int, contexts: list[int]) -> tuple[float, float]:
    """Tokens a second of a whole generation, run in full and integrated from sampled steps.

    Behind every step of the generation comes one at a sampled context beside it, the one below and the one above by
    turns. Of a context's steps the mean is taken: what it is compared with is a sum.
    """
    sampled = Model(name, model.model)  # the same weights beside a cache of its own
    for engine in (model, sampled):
        engine.prepare(batch, tokens)
        engine.step(1)
    full = 0.0
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for context in range(1, tokens + 1):
        full += model.step(context)
        above = bisect_left(contexts, context)
        beside = contexts[max(above - context % 2, 0)]
        times[beside].append(sampled.step(beside))
    rows = [
        {"model": name, "batch": batch, "context": context, "step_seconds": statistics.mean(seconds)}
        for context, seconds in times.items()
    ]
    for engine in (model, sampled):
        engine.release()
    return batch * tokens / full, one_in_n_out(rows, name, batch, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="N")
    parser.add_argument("--mixer", default="mamba1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    config = LlamaConfig(**SHAPE, max_position_embeddings=args.tokens)
    models = random_models(config, [LAYERS // 2], [args.mixer], MixerConfig(), torch.float32, "cpu")
    engines = {name: Model(name, model) for name, model in models.items()}
    parts = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4)  # closer at the beginning, where a step grows fastest
    options = ThroughputConfig(contexts=[int(part * args.tokens) for part in parts], output_tokens=args.tokens)
    contexts = contexts_of(options)
    result: dict[str, dict[str, float]] = {}
    for name, engine in engines.items():
        whole, integrated = both_ways(name, engine, args.batch, args.tokens, contexts)
        kv, weights = engine.shape.kv_bytes(args.batch, args.tokens), engine.shape.weight_bytes
        result[name] = {
            "full": whole,
            "sampled": integrated,
            "difference": integrated / whole - 1,
            "kv_bytes": kv,
            "weight_bytes": weights,
            "kv_over_weights": kv / weights,
        }
        print(
            f"{name:16s} full {whole:8,.0f} tokens/s, sampled {integrated:8,.0f}: {integrated / whole - 1:+.1%}; keys "
            f"and values {kv / weights:.1f} times the weights",
            flush=True,
        )
    print(f"batch {args.batch}, 1 in, {args.tokens} out; {time.perf_counter() - began:.0f} s")
    worst = max(abs(row["difference"]) for row in result.values())
    print(json.dumps({"worst_difference": worst, "threads": args.threads, "models": result}))


if __name__ == "__main__":
    main()
