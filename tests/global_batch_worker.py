"""One rank of the step that test_global_batch.py starts: gradients of one global batch, by our trainer.

Usage: torchrun --nproc-per-node N global_batch_worker.py FOLDER [zero3], where FOLDER has ``teacher``, ``student``
and ``rows.pt``; rank 0 writes ``N-ACCUMULATION.pt``, the loss and the gradients (``zero3-2-4.pt`` of an engine that has
student, its head and teacher in parts).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import distill  # noqa: F401  registers the hybrids
from distill import distributed
from distill.config import EngineConfig, TrainConfig
from distill.engine import sharing
from distill.sharded import ShardedTeacher
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments

LOSS, TAU = "0.7 reverse_kl + 0.2 forward_kl + 0.1 cross_entropy", 1.5


class Keep(TrainerCallback):
    """Keeps the gradients that the optimizer would see."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def step(folder: Path, rows: Any, accumulation: int, engine: EngineConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of one global batch: its loss, and its gradients put together."""
    options = TrainConfig(
        batch_size=len(rows), gradient_accumulation=accumulation, learning_rate=0.0, warmup_steps=0, max_grad_norm=0.0
    )
    place = folder / f"out-{engine.config}-{accumulation}"
    arguments = training_arguments(options, 1, place, seed=0, engine=engine)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    student = AutoModelForCausalLM.from_pretrained(folder / "student").train()
    keep = Keep()
    if engine.name == "deepspeed":
        gather_in_zero(keep)
    trainer = fit(
        DistillTrainer, student, rows, arguments, title="test", log=None, callbacks=[keep],
        teacher=ShardedTeacher(teacher) if engine.name == "deepspeed" else Teacher(teacher), loss=LOSS, temperature=TAU,
    )  # fmt: skip
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line), keep.gradients


def gather_in_zero(keep: Keep) -> None:
    """Have the gradients kept when DeepSpeed's engine is about to take its step, in which they are gone."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    if not hasattr(DeepSpeedEngine, "plain_step"):
        DeepSpeedEngine.plain_step = DeepSpeedEngine.step

    def stepping(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            keep.gradients = {name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}
        return engine.plain_step(*args, **kwargs)

    DeepSpeedEngine.step = stepping


def main() -> None:
    folder = Path(sys.argv[1])
    name = sys.argv[2] if len(sys.argv) > 2 else ""
    engine = EngineConfig(name="deepspeed" if name else "auto", config=name)
    torch.set_num_threads(1)
    rows = torch.load(folder / "rows.pt")
    if name:
        distributed.join()
    for accumulation in (1, 4):
        with sharing(engine):
            loss, gradients = step(folder, rows, accumulation, engine)
            world, rank = distributed.world(), distributed.rank()
        if rank == 0:
            prefix = f"{name}-" if name else ""
            torch.save({"loss": loss, "gradients": gradients}, folder / f"{prefix}{world}-{accumulation}.pt")


if __name__ == "__main__":
    main()
