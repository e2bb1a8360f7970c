"""MIL-Mamba-replacement: the loss after a short distillation with one more block swapped.

Apriel-H1, section 3.1 and figure 2: for each block that still has attention, swap its mixer in the current model
(MIL-initialised), distil for ``steps`` steps, and take the loss. Every candidate sees the same seed and data, and
both losses (at 0 steps and after the last) are taken on the same fixed held-out tokens. The paper trains everything;
where only the block or its mixer is trained, the candidates go in lockstep (``lockstep.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from distill import interrupt
from distill.config import ScoreConfig
from distill.hybrid.surgery import hybridize
from distill.importance import Setup
from distill.importance.halving import order, row_of, rungs, steps_of, summary, survivors
from distill.importance.lockstep import lockstep, precision, schedule_of, serves, trained_part
from distill.mixers import ATTENTION, set_kernels
from distill.placement import replace
from distill.progress import Countdown
from distill.records import read_json, write_json
from distill.trainer import DistillTrainer, fit, heldout_loss, training_arguments

__all__ = ["NEEDS", "TRAINABLE", "complete", "lockstep", "order", "score", "separate"]
NEEDS = ("rows",)
TRAINABLE = ("all", "block", "mixer")


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by its held-out distillation loss after ``mmr.steps`` steps."""
    options = setup.config.mmr
    rows = lockstep(setup) if serves(setup) else separate(setup)
    record = {
        "scorer": "mmr",
        "steps": options.steps,
        "trainable": options.trainable,
        "heldout_tokens": len(setup.heldout) * setup.heldout[0]["input_ids"].shape[-1],
        "blocks": rows,
        "order": order(rows),
    }
    return complete(record, setup.config, setup.added)


def complete(record: dict[str, Any], config: ScoreConfig, added: int) -> dict[str, Any]:
    """A record with what follows from the rows of all candidates."""
    return record | summary(record["blocks"], config.mmr, added)


def separate(setup: Setup) -> list[dict[str, float]]:
    """The row of every candidate, one training after the other; with halving, from rung to rung."""
    options = setup.config.mmr
    stops = rungs(options) if options.halving else [options.steps]
    journal = setup.scratch / "losses.json"
    losses = known(journal) if options.halving else {}
    alive = list(setup.blocks)
    countdown = Countdown("mmr, all blocks", steps_of(len(alive), options, setup.added))
    for before, stop in zip([0, *stops], stops, strict=False):
        for number, block in enumerate(alive, 1):
            if stop not in losses.get(block, {}):
                title = f"mmr block {block} ({number}/{len(alive)})"
                losses[block] = losses.get(block, {}) | distil(setup, block, stop, title, taken=bool(losses.get(block)))
                if options.halving:
                    setup.scratch.mkdir(parents=True, exist_ok=True)
                    write_json(journal, {str(each): found for each, found in losses.items()})
            countdown.step(stop - before)
            if stop == options.steps:
                finish(setup, row_of(block, losses[block], options))
        if stop < options.steps:
            kept = survivors({block: losses[block][stop] for block in alive}, setup.added)
            for block in set(alive) - set(kept):
                finish(setup, row_of(block, losses[block], options))
            alive = kept
    return [row_of(block, losses[block], options) for block in setup.blocks]


def known(journal: Path) -> dict[int, dict[int, float]]:
    """By block and step, the losses that an earlier session took."""
    found = read_json(journal) if journal.is_file() else {}
    return {int(block): {int(step): loss for step, loss in each.items()} for block, each in found.items()}


def finish(setup: Setup, row: dict[str, float]) -> None:
    """Report a candidate that goes no further."""
    shutil.rmtree(place(setup, int(row["block"])), ignore_errors=True)
    setup.report(int(row["block"]), row)


def place(setup: Setup, block: int) -> Path:
    """Where a candidate's training writes."""
    return setup.scratch / f"block-{block}"


def distil(setup: Setup, block: int, stop: int, title: str, *, taken: bool = False) -> dict[int, float]:
    """Train a candidate up to step ``stop``, from its checkpoint if it has one; its held-out losses by step, that at 0
    unless it is ``taken`` already."""
    options, train = setup.config.mmr, schedule_of(setup)
    model = candidate(setup, block)
    losses = {} if taken else {0: loss_of(setup, model)}
    model.requires_grad_(False)
    trained_part(model, block, options.trainable).requires_grad_(True)
    at = AtRungs([step for step in rungs(options) if step < options.steps], stop, lambda: loss_of(setup, model))
    fit(
        DistillTrainer,
        model,
        setup.rows,
        training_arguments(train, options.steps, place(setup, block), setup.seed, setup.dtype),
        title=title,
        log=None,
        callbacks=[at],
        teacher=setup.teacher,
        loss=train.loss,
        temperature=train.temperature,
        mixer_learning_rate=train.mixer_learning_rate,
    )
    if interrupt.asked():  # the training has ended early
        raise interrupt.Stopped(interrupt.number())
    return {**losses, **at.losses, stop: loss_of(setup, model)}


class AtRungs(TrainerCallback):
    """Takes the held-out loss after chosen ``steps``; a training that is to ``stop`` before its end does so with a
    checkpoint."""

    def __init__(self, steps: Sequence[int], stop: int, evaluate: Callable[[], float]) -> None:
        self.steps, self.stop, self.evaluate = steps, stop, evaluate
        self.losses: dict[int, float] = {}

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop < state.max_steps:
            control.should_save = control.should_training_stop = True
        elif state.global_step in self.steps:
            self.losses[state.global_step] = self.evaluate()


def candidate(setup: Setup, block: int) -> Any:
    """The current model with ``block`` swapped, a copy; the same mixer that the swap step would make."""
    before = getattr(setup.model.config, "mixers", None) or [ATTENTION] * setup.model.config.num_hidden_layers
    model = hybridize(setup.model, replace(before, [block], setup.mixer.of), setup.mixer, seed=setup.seed)
    set_kernels(model, setup.kernels)
    return model.requires_grad_(True).train()


def loss_of(setup: Setup, model: Any) -> float:
    """Held-out distillation loss per valid target, before and after training in the same precision."""
    with torch.no_grad(), precision(setup):
        return heldout_loss(
            model, setup.teacher, setup.heldout, setup.train.batch_size, setup.train.loss, setup.train.temperature
        )
