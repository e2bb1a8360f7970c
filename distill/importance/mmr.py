"""MIL-Mamba-replacement: the loss after a short distillation with one more block swapped.

Apriel-H1, section 3.1 and figure 2: for each block that still has attention, swap its mixer in the current model
(MIL-initialised), distil for ``steps`` steps, and take the loss. Every candidate sees the same seed and data, and
both losses (at 0 steps and after the last) are taken on the same fixed held-out tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace as replaced
from typing import Any

import torch

from distill.hybrid.surgery import hybridize
from distill.importance import Setup
from distill.mixers import ATTENTION, set_kernels
from distill.placement import replace
from distill.trainer import DistillTrainer, fit, heldout_loss, training_arguments

NEEDS = ("rows",)
TRAINABLE = ("all", "mixer")


def order(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks from least to most important: by the loss after the last step."""
    return [int(row["block"]) for row in sorted(rows, key=lambda row: (row["score"], row["block"]))]


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its held-out distillation loss after ``mmr.steps`` steps."""
    options = setup.config.mmr
    rows: list[dict[str, float]] = []
    for number, block in enumerate(setup.blocks, 1):
        model = candidate(setup, block)
        start = loss_of(setup, model)
        if options.trainable == "mixer":
            model.requires_grad_(False)
            model.model.layers[block].self_attn.requires_grad_(True)
        scratch = setup.scratch / f"block-{block}"
        train = replaced(setup.train, save_steps=0, warmup_steps=min(setup.train.warmup_steps, options.steps // 10))
        fit(
            DistillTrainer,
            model,
            setup.rows,
            training_arguments(train, options.steps, scratch, setup.seed, setup.dtype),
            title=f"mmr block {block} ({number}/{len(setup.blocks)})",
            log=None,
            teacher=setup.teacher,
            loss=setup.train.loss,
            temperature=setup.train.temperature,
            mixer_learning_rate=setup.train.mixer_learning_rate,
        )
        end = loss_of(setup, model)
        shutil.rmtree(scratch, ignore_errors=True)
        row = {"block": block, "score": end, "loss_start": start, "loss_end": end}
        rows.append(row)
        setup.report(block, row)
        del model
    return {
        "scorer": "mmr",
        "steps": options.steps,
        "trainable": options.trainable,
        "heldout_tokens": len(setup.heldout) * setup.heldout[0]["input_ids"].shape[-1],
        "blocks": rows,
        "order": order(rows),
    }


def candidate(setup: Setup, block: int) -> Any:
    """The current model with ``block`` swapped, a copy; the same mixer that the swap step would make."""
    before = getattr(setup.model.config, "mixers", None) or [ATTENTION] * setup.model.config.num_hidden_layers
    model = hybridize(setup.model, replace(before, [block], setup.mixer.of), setup.mixer, seed=setup.seed)
    set_kernels(model, setup.kernels)
    return model.requires_grad_(True).train()


def loss_of(setup: Setup, model: Any) -> float:
    """Held-out distillation loss per valid target."""
    with torch.no_grad():
        return heldout_loss(
            model, setup.teacher, setup.heldout, setup.train.batch_size, setup.train.loss, setup.train.temperature
        )
