"""Teachers and hybrids from their shapes alone: models of random weights to be timed, or what a roofline predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distill.config import MixerConfig, ThroughputConfig
from distill.errors import UserError
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import check_convertible, hybrid_config, keep_fp32
from distill.mixers import ATTENTION, mixer_class
from distill.placement import replace
from eval import serving
from eval.machine import Machine
from eval.roofline import Shape, pays_from, shapes_of


def check_blocks(blocks: Sequence[int], layers: int) -> list[int]:
    """The numbers of replaced blocks, 0 (the teacher) first; UserError for one that leaves no attention."""
    for h in blocks:
        if not 0 <= h < layers:
            raise UserError(f"h={h} must be in [0, {layers}): of the model's {layers} blocks one must keep attention")
    return sorted({0, *blocks})


def random_models(
    teacher: Any, blocks: Sequence[int], mixers: Sequence[str], options: MixerConfig, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Name -> model of random weights: the teacher (a config), and H1-h/L for each number of blocks and each mixer.

    What a hybrid has in common with the teacher is one module in memory, and so is the mixer of a block in all hybrids
    that have it; the last h blocks are replaced.
    """
    family, layers = check_convertible(teacher), teacher.num_hidden_layers
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(teacher, dtype=dtype).eval()
    models, made = {"teacher": base}, {}
    for mixer in mixers:
        for h in blocks:
            if not h:
                continue
            placement = replace([ATTENTION] * layers, range(layers - h, layers), mixer)
            config = hybrid_config(base.config, placement, options)
            with torch.device("meta"):
                hybrid = FAMILIES[family][1](config)
            hybrid.lm_head = base.lm_head
            for name, child in base.model.named_children():
                if name != "layers":
                    setattr(hybrid.model, name, child)
            for block, layer in enumerate(base.model.layers):
                for name, child in layer.named_children():
                    setattr(hybrid.model.layers[block], name, child)
                if placement[block] == ATTENTION:
                    continue
                if (mixer, block) not in made:
                    with torch.random.fork_rng(), torch.device(device):
                        torch.manual_seed(block)
                        made[mixer, block] = mixer_class(mixer)(config, block).to(dtype)
                    keep_fp32(made[mixer, block])
                hybrid.model.layers[block].self_attn = made[mixer, block]
            models[f"H1-{h}/{layers} {mixer}"] = hybrid.eval()
    return models


def predicted(
    teacher: Any,
    blocks: Sequence[int],
    mixers: Sequence[str],
    mixer: MixerConfig,
    options: ThroughputConfig,
    machine: Machine,
    width: int,
) -> dict[str, Any]:
    """A record as `eval.throughput.measure` and `eval.serving.details` would give it, had every step and prefill
    reached the roofline of ``machine``: ``throughput`` and ``serving``, in which ``how`` is ``predicted``."""
    shapes = shapes_of(teacher, blocks, mixers, mixer, width)
    rows = []
    for batch in options.batches:
        rows += step_rows(shapes, dict.fromkeys(shapes, batch), options, machine)
    cap = options.memory_gb * 1e9 or serving.USABLE * machine.memory
    largest = {name: shape.largest_batch(options.output_tokens, cap, overhead(shape)) for name, shape in shapes.items()}
    fitting = {name: shape for name, shape in shapes.items() if largest[name]}
    second = [
        {**row, "memory_bytes": cap, "largest_batch": largest[row["model"]]}
        for row in step_rows(fitting, largest, options, machine)
    ]
    names = list(shapes)
    speeds = serving.speed_rows(names, rows, options, "equal_batch")
    speeds += serving.speed_rows(names, second, options, "equal_memory")
    prefill = [
        prefill_row(name, shape, batch, tokens, machine)
        for batch in options.batches
        for tokens in sorted(set(options.contexts))
        for name, shape in shapes.items()
        if batch * tokens <= options.prefill_tokens
    ]
    memory = [
        serving.memory_row(shape, name, tokens, overhead(shape), None)
        for name, shape in shapes.items()
        for tokens in sorted(options.lengths)
    ]
    pays = {name: pays_from(teacher, name, mixer, machine, options.batches, width) for name in mixers}
    return {
        "throughput": rows,
        "serving": {
            "machine": serving.machine_record(machine),
            "one_in_n_out": serving.with_ratios([{**row, "how": "predicted"} for row in speeds], "teacher"),
            "equal_memory": second,
            "prefill": prefill,
            "memory": memory,
            "pays_from": pays,
        },
    }


def overhead(shape: Shape) -> int:
    """Bytes of the largest activations of a step for one sequence: the logits, or a block's gate beside its input."""
    return shape.width * max(shape.head[1], 3 * shape.intermediate) + shape.width * 4 * shape.hidden


def step_rows(
    shapes: Mapping[str, Shape], batches: Mapping[str, int], options: ThroughputConfig, machine: Machine
) -> list[dict[str, Any]]:
    """Rows with the keys of `eval.throughput`, of steps that take what the roofline says."""
    rows = []
    for context in sorted({1, options.output_tokens, *options.contexts}):
        for name, shape in shapes.items():
            batch = batches[name]
            seconds = shape.step(batch, context, machine)
            kv, states, more = shape.kv_bytes(batch, context), shape.state_bytes(batch), batch * overhead(shape)
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "context": context,
                    "step_seconds": seconds,
                    "step_seconds_low": seconds,
                    "step_seconds_high": seconds,
                    "tokens_per_second": batch / seconds,
                    "roofline_seconds": seconds,
                    "roofline_fraction": 1.0,
                    "cache_bytes": kv + states,
                    "kv_bytes": kv,
                    "state_bytes": states,
                    "weight_bytes": shape.weight_bytes,
                    "overhead_bytes": more,
                    "peak_bytes": shape.weight_bytes + kv + states + more,
                }
            )
    return rows


def prefill_row(name: str, shape: Shape, batch: int, tokens: int, machine: Machine) -> dict[str, Any]:
    """A row with the keys of a measured prefill."""
    seconds = shape.prefill(batch, tokens, machine)
    times = dict.fromkeys(("seconds", "seconds_low", "seconds_high", "roofline_seconds"), seconds)
    speed = {"tokens_per_second": batch * tokens / seconds, "roofline_fraction": 1.0}
    return {"model": name, "batch": batch, "tokens": tokens, **times, **speed}
