"""A DeepSpeed checkpoint of so many processes, for another number of them: DeepSpeed's universal form, made on the way.

What is frozen is in no universal checkpoint. It need not be: it has not changed since the model was loaded, and loading
a universal checkpoint leaves it alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from distill import distributed
from distill.errors import UserError, brief

FOLDER = "universal"
"""Beside the checkpoints; it goes when the training has begun."""


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a DeepSpeed checkpoint; 0 for one that is none."""
    return len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


def kind_of(checkpoint: Path) -> str:
    """What wrote a checkpoint of a training: ``deepspeed``, ``fsdp`` or ``plain`` (one process, or DDP)."""
    if any(checkpoint.glob("global_step*")):
        return "deepspeed"
    return "fsdp" if any(checkpoint.glob("optimizer*.bin")) or any(checkpoint.glob("*_0/.metadata")) else "plain"


def resumable(checkpoint: Path | None, arguments: TrainingArguments, engine: str) -> Path | None:
    """The folder to resume from: ``checkpoint``, or what was made of it for this number of processes.

    Every process has to ask. Raises UserError for the checkpoint of another engine.
    """
    if checkpoint is None:
        return None
    if (found := distributed.agreed(lambda: kind_of(checkpoint))) != (
        wanted := engine if engine in ("deepspeed", "fsdp") else "plain"
    ):
        raise UserError(
            f"{checkpoint} was written by another engine ({found}; this is {wanted}), whose optimizer state is in "
            "another form: go on with the engine that it began with, or remove its checkpoints to begin anew"
        )
    if engine != "deepspeed" or distributed.agreed(lambda: processes_of(checkpoint)) == distributed.world():
        return checkpoint
    target = checkpoint.with_name(FOLDER)
    distributed.agreed(lambda: convert(checkpoint, target))
    settings: Any = arguments.hf_deepspeed_config
    settings.config["checkpoint"] = {**settings.config.get("checkpoint", {}), "load_universal": True}
    return target


def convert(checkpoint: Path, target: Path) -> None:
    """Write the universal form of a checkpoint to ``target``, with all else that the Trainer reads of one."""
    remove(target)
    step = next(checkpoint.glob("global_step*"))
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("global_step*", "*.safetensors", "latest*"))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(step), "--output_folder", str(target / f"{step.name}_universal")]
    environment = {name: value for name, value in os.environ.items() if name not in distributed.VARIABLES}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"{checkpoint} cannot be made ready for another number of processes: {brief(done.stderr[-500:])}"
        )
    (target / "latest_universal").write_text(f"{step.name}_universal", encoding="utf-8")


def repair(trainer: Any, decays: list[float]) -> None:
    """Put right what DeepSpeed's loading of a universal checkpoint does to ZeRO-3's optimizer: every group gets the
    options of the first, and all groups one step counter, which each of them then counts up.

    ``decays``: the weight decay of every group, as the optimizer was made.
    """
    optimizer = trainer.deepspeed.optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    rates = trainer.lr_scheduler.get_last_lr()
    for group, decay, rate in zip(optimizer.param_groups, decays, rates, strict=True):
        group["weight_decay"], group["lr"] = decay, rate


def remove(target: Path) -> None:
    """Remove what ``convert`` wrote."""
    if target.is_dir():
        shutil.rmtree(target)
