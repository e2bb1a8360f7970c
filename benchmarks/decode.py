"""Decode step of the embedded teacher and of its hybrids, beside the operator roofline of this machine.

    python benchmarks/decode.py --threads 2 --batch 32 --contexts 256 1024 4096

The roofline is the sum over operators of max(bytes / copy bandwidth, flops / product peak), both measured at the start:
every projection (weights, inputs, outputs), attention over its keys and values, the mixers' states read and written,
norms and activations. Models take turns; times are the fastest of several steps. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from machine import Machine
from torch import nn

import distill  # noqa: F401
from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.mixers import ATTENTION
from distill.teacher import load_model
from eval.backends.hf import Decoder

FLOAT = 4  # bytes


def roofline(model: nn.Module, machine: Machine, batch: int, context: int) -> float:
    """Least seconds of one decode step of ``model`` [batch, 1] at ``context``, operator by operator."""
    config: Any = model.config
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
            nbytes = FLOAT * (inputs * outputs + batch * (inputs + outputs))
            total += machine.seconds(flops=2 * batch * inputs * outputs, nbytes=nbytes)
        elif "RMSNorm" in type(module).__name__:
            total += machine.seconds(nbytes=2 * FLOAT * batch * config.hidden_size)
    for mixer in getattr(config, "mixers", None) or [ATTENTION] * config.num_hidden_layers:
        total += machine.seconds(nbytes=3 * FLOAT * batch * config.intermediate_size)  # the MLP's gate
        inner = config.num_attention_heads * config.head_dim
        if mixer == ATTENTION:
            kept = batch * context * config.num_key_value_heads * config.head_dim
            total += machine.seconds(flops=4 * batch * context * inner, nbytes=2 * FLOAT * kept)
        else:
            options = config.mixer_config
            states, channels = (
                (min(options["d_state"], config.head_dim), 1) if mixer == "mamba1" else (config.head_dim, 3)
            )
            held = batch * inner * (states + channels * (options["d_conv"] - 1))
            total += machine.seconds(flops=6 * batch * inner * states, nbytes=2 * FLOAT * held)
    return total


def models(blocks: list[int], mixers: list[str]) -> dict[str, Any]:
    """The teacher and, for each number of blocks and each mixer, a hybrid whose last blocks are replaced (which ones
    they are makes no difference to speed)."""
    teacher = load_model("embedded")
    layers = teacher.config.num_hidden_layers
    found = {"teacher": teacher}
    for h in blocks:
        for mixer in mixers:
            placement = [ATTENTION] * (layers - h) + [mixer] * h
            found[f"H1-{h}/{layers} {mixer}"] = hybridize(teacher, placement, MixerConfig())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 6, 7, 8])
    parser.add_argument("--mixers", nargs="+", default=["mamba1", "mamba2"])
    parser.add_argument("--seconds", type=float, default=2.0, help="a model and context")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine, measured = Machine.measure(), models(args.blocks, args.mixers)
    print(f"{machine}\nbatch {args.batch}; milliseconds a step (and the part of the roofline reached)")
    rows = []
    for context in args.contexts:
        decoders = {name: Decoder(model, args.batch, context) for name, model in measured.items()}
        best = dict.fromkeys(decoders, float("inf"))
        end = time.perf_counter() + args.seconds * len(decoders)
        while time.perf_counter() < end:
            for name, decoder in decoders.items():
                best[name] = min(best[name], decoder.timed_step())
        for name, seconds in best.items():
            fraction = roofline(measured[name], machine, args.batch, context) / seconds
            rows.append({"model": name, "context": context, "step_seconds": seconds, "roofline_fraction": fraction})
            speedup = best["teacher"] / seconds
            rows[-1] |= {"speedup": speedup, "fraction_of_teachers": fraction / teachers(rows, context)}
            print(
                f"  context {context:5d}  {name:16s} {1e3 * seconds:8.2f}  ({fraction:.2f})  {speedup:.2f}x", flush=True
            )
    longest = [row for row in rows if row["context"] == max(args.contexts)]
    result = {
        "batch": args.batch,
        "threads": args.threads,
        "roofline_fraction": {row["model"]: round(row["roofline_fraction"], 3) for row in longest},
        "speedup": {row["model"]: round(row["speedup"], 3) for row in longest},
        "least_fraction_of_teachers": {
            str(context): min(row["fraction_of_teachers"] for row in rows if row["context"] == context)
            for context in args.contexts
        },
        "rows": rows,
    }
    print(json.dumps(result))


def teachers(rows: list[dict[str, Any]], context: int) -> float:
    return next(r["roofline_fraction"] for r in rows if r["model"] == "teacher" and r["context"] == context)


if __name__ == "__main__":
    main()
