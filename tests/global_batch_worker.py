"""One rank of the step that test_global_batch.py starts: gradients of one global batch, by our trainer.

Usage: torchrun --nproc-per-node N global_batch_worker.py FOLDER, where FOLDER has ``teacher``, ``student`` and
``rows.pt``; rank 0 writes ``N-ACCUMULATION.pt``, the loss and the gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainerCallback

import distill  # noqa: F401  registers the hybrids
from distill.config import TrainConfig
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments

LOSS, TAU = "0.7 reverse_kl + 0.2 forward_kl + 0.1 cross_entropy", 1.5


class Keep(TrainerCallback):
    """Keeps the gradients that the optimizer would see."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rows = torch.load(folder / "rows.pt")
    for accumulation in (1, 4):
        options = TrainConfig(
            batch_size=len(rows),
            gradient_accumulation=accumulation,
            learning_rate=0.0,
            warmup_steps=0,
            max_grad_norm=0.0,
        )
        arguments = training_arguments(options, 1, folder / f"out-{accumulation}", seed=0)
        student = AutoModelForCausalLM.from_pretrained(folder / "student").train()
        teacher = Teacher(AutoModelForCausalLM.from_pretrained(folder / "teacher"))
        keep = Keep()
        trainer = fit(
            DistillTrainer, student, rows, arguments, title="test", log=None, callbacks=[keep],
            teacher=teacher, loss=LOSS, temperature=TAU,
        )  # fmt: skip
        loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if trainer.is_world_process_zero():
            torch.save({"loss": loss, "gradients": keep.gradients}, folder / f"{world}-{accumulation}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
