"""Decode step of a teacher and of its hybrids, beside the operator roofline of this machine.

    python benchmarks/decode.py --threads 2 --batch 32 --contexts 256 1024 4096
    python benchmarks/decode.py --model 50m --threads 2          (the embedded teacher's family, six times as wide)

The roofline (`eval/roofline.py`) is the sum over operators of max(bytes / copy bandwidth, flops / product peak), both
the best of measurements at the start and after each context: every projection (weights, inputs, outputs), attention
over its keys and values, the mixers' states read and written, norms and activations. Models take turns; times are the
fastest of several steps. ``--operators`` also prints where the teacher's time goes. The last line of output is JSON.
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
from torch.profiler import ProfilerActivity, profile

import distill  # noqa: F401
from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.mixers import ATTENTION
from distill.teacher import load_config, load_model
from eval.backends.hf import Model
from eval.machine import Machine
from eval.shapes import random_models

WIDER = 6
MODELS = ("embedded", "50m")


def models(name: str, blocks: list[int], mixers: list[str]) -> dict[str, Any]:
    """The teacher and, for each number of blocks and each mixer, a hybrid whose last blocks are replaced (which ones
    they are makes no difference to speed)."""
    if name == "50m":
        config = load_config("embedded")
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            setattr(config, key, WIDER * getattr(config, key))
        return random_models(config, blocks, mixers, MixerConfig(), torch.float32, "cpu")
    teacher = load_model("embedded")
    layers = teacher.config.num_hidden_layers
    found = {"teacher": teacher}
    for h in blocks:
        for mixer in mixers:
            placement = [ATTENTION] * (layers - h) + [mixer] * h
            found[f"H1-{h}/{layers} {mixer}"] = hybridize(teacher, placement, MixerConfig())
    return found


def best_of_turns(machine: Machine, again: Machine) -> Machine:
    """The better of two measurements of a machine: what it can do, not what else it did."""
    return Machine(
        machine.name,
        max(machine.copy, again.copy),
        max(machine.gemm, again.gemm),
        max(machine.exps, again.exps),
        machine.memory,
    )


def operators(engine: Model, context: int) -> None:
    """Print the share of the time of a step that each of PyTorch's operators takes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            engine.step(context)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"  where {engine.name} spends a step at context {context} (compiled attention: within its caller)")
    for event in events[:8]:
        print(f"    {event.self_cpu_time_total / total:6.1%}  {event.key}  x {event.count // 5}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", help="default: 5 6 7 8; of 50m 5 8")
    parser.add_argument("--mixers", nargs="+", default=["mamba1", "mamba2"])
    parser.add_argument("--seconds", type=float, default=2.0, help="a model and context")
    parser.add_argument("--operators", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks = args.blocks or ([5, 6, 7, 8] if args.model == "embedded" else [5, 8])
    machine = Machine.measure()
    engines = {name: Model(name, model) for name, model in models(args.model, blocks, args.mixers).items()}
    times: dict[tuple[str, int], float] = {}
    for engine in engines.values():
        engine.prepare(args.batch, max(args.contexts))
    for context in args.contexts:
        end = time.perf_counter() + args.seconds * len(engines)
        while time.perf_counter() < end or ("teacher", context) not in times:
            for name, engine in engines.items():
                times[name, context] = min(engine.step(context), times.get((name, context), float("inf")))
        machine = best_of_turns(machine, Machine.measure(again=True))
    if args.operators:
        operators(engines["teacher"], max(args.contexts))
    parameters = engines["teacher"].shape.parameters
    print(f"{machine}\n{args.model}, {parameters / 1e6:.1f} M parameters, batch {args.batch}; milliseconds a step (and "
          "the part of the roofline reached)")  # fmt: skip
    rows = []
    for context in args.contexts:
        for name, engine in engines.items():
            seconds = times[name, context]
            fraction = engine.shape.step(args.batch, context, machine) / seconds
            speedup = times["teacher", context] / seconds
            row = {"model": name, "context": context, "step_seconds": seconds, "roofline_fraction": fraction}
            rows.append(row | {"speedup": speedup})
            rows[-1]["fraction_of_teachers"] = fraction / teachers(rows, context)
            print(f"  context {context:5d}  {name:16s} {1e3 * seconds:8.2f}  ({fraction:.2f})  {speedup:.2f}x")
    longest = [row for row in rows if row["context"] == max(args.contexts)]
    result = {
        "model": args.model,
        "parameters": parameters,
        "batch": args.batch,
        "threads": args.threads,
        "copy_bytes_per_second": machine.copy,
        "product_flops_per_second": machine.gemm,
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
