"""One rank of the training that test_deepspeed.py starts: a hybrid under every ZeRO stage, saved in each way.

Usage: torchrun --nproc-per-node 2 deepspeed_worker.py FOLDER OUTPUT, where FOLDER has the hybrid ``my-hybrid``,
``ids.pt`` to train it on, and ``snippet.py``, which is the documentation's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import distill  # noqa: F401  registers the hybrids

STEPS, RATE = 6, 2e-3
RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero3_bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero3_autocast": {"zero_optimization": {"stage": 3}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def no_compiled_operators() -> None:
    """DeepSpeed would compile one for its CPU collectives at the first init (80 s); gloo serves without it."""
    import deepspeed.ops

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False


def settings(run: str) -> dict[str, Any]:
    """DeepSpeed's config of a run."""
    zero = {**RUNS[run]["zero_optimization"], "stage3_param_persistence_threshold": 0}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **RUNS[run],
        "zero_optimization": zero,
    }


def train(run: str, source: Path, output: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Train a hybrid from a folder and save it; losses (of all ranks) and dtypes."""
    config = settings(run)
    held = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None
    model = AutoModelForCausalLM.from_pretrained(source)  # under stage 3 every rank gets its part only
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(STEPS):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    dtypes = {name: str(parameter.dtype) for name, parameter in engine.module.named_parameters()}
    whole = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    engine.save_checkpoint(str(output / run), tag="last")
    engine.save_16bit_model(str(output / run / "gathered"))
    if dist.get_rank() == 0:
        torch.save(whole, output / run / "expected.pt")
    # on from what was saved
    again = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.AdamW(again.parameters(), lr=RATE, weight_decay=0.0)
    resumed, *_ = deepspeed.initialize(model=again, optimizer=optimizer, config=config)
    resumed.load_checkpoint(str(output / run), tag="last")
    next_losses = []
    for one in (engine, resumed):
        loss = one(input_ids=ids, labels=ids, use_cache=False).loss
        one.backward(loss)
        one.step()
        next_losses.append([float(loss), float(one(input_ids=ids, labels=ids, use_cache=False).loss)])
    del held
    return {"losses": losses, "dtypes": dtypes, "next": next_losses}


def fresh(source: Path) -> dict[str, Any]:
    """A hybrid built under ZeRO-3 without weights: what the mixers' own parameters start as."""
    held = HfDeepSpeedConfig(settings("zero3"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    mixers = [block.self_attn for block in model.model.layers if hasattr(block.self_attn, "mil_slots")]
    own = [parameter for mixer in mixers for parameter in mixer.parameters(recurse=False)]
    assert all(parameter.numel() == 0 for parameter in own), "not in parts"
    with deepspeed.zero.GatheredParameters(own):
        found = {
            type(mixer).__module__.rpartition(".")[2]: {
                name: parameter.detach().flatten().tolist() for name, parameter in mixer.named_parameters(recurse=False)
            }
            for mixer in mixers
        }
    del held
    return found


def page(snippet: str, folder: Path) -> list[float]:
    """Run a snippet of the documentation in a folder; losses of the ``trainer`` that it made."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/ecosystem.md", "exec"), names)
    return [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    no_compiled_operators()
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    ids = torch.load(source / "ids.pt")[2 * rank : 2 * rank + 2]
    found: dict[str, Any] = {run: train(run, source / "my-hybrid", output, ids) for run in RUNS}
    found["fresh"] = fresh(source / "my-hybrid")
    found["page"] = page((source / "snippet.py").read_text(), source)
    if rank == 0:
        (output / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
