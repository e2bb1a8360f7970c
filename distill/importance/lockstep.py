"""MMR with little trained, all candidates at once: the losses of separate trainings, in less than half of the time.

Where only the swapped mixer (or its block) is trained, all below block l is the current model itself and frozen. One
pass of the teacher and one of the current model serve every candidate of a batch: candidate l goes on from the cached
input of block l, forward and back through l..L. Weights that are not trained are the current model's own tensors,
without gradients; a candidate has a mixer (or block), its gradients and AdamW's moments of its own.

In block passes a batch: L separate trainings take about 2.5 L^2, in lockstep they take L^2 + 2 L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace as replaced
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from distill import interrupt
from distill.config import TrainConfig
from distill.data.pack import collate
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.importance import Setup
from distill.importance.halving import row_of, rungs, survivors
from distill.importance.loo import block_as_identity, recording
from distill.losses import count_targets, distillation_loss
from distill.machine import free_memory
from distill.mixers import ATTENTION, set_kernels
from distill.placement import replace
from distill.progress import Countdown
from distill.trainer import DistillTrainer, training_arguments

SHARE = 0.5
"""Of the memory that is free, what candidates may take by themselves; the rest is for a batch's activations."""
COPIES = 4
"""Weights, gradients and two moments."""


def serves(setup: Setup) -> bool:
    """Whether candidates can go in lockstep: little is trained, and nothing is drawn at random on the way."""
    options, config = setup.config.mmr, setup.model.config
    return options.lockstep and options.trainable != "all" and not getattr(config, "attention_dropout", 0.0)


def schedule_of(setup: Setup) -> TrainConfig:
    """How every candidate is trained: as the run's models, but for a warm-up that fits the few steps."""
    return replaced(setup.train, save_steps=0, warmup_steps=min(setup.train.warmup_steps, setup.config.mmr.steps // 10))


def precision(setup: Setup) -> AbstractContextManager[Any]:
    """What a candidate is computed in: with its float32 weights, or by autocast."""
    return torch.autocast(setup.model.device.type, dtype=torch.bfloat16, enabled=setup.dtype == "bfloat16")


def trained_part(model: Any, block: int, trainable: str) -> nn.Module:
    """What of a candidate is trained: all of it, the block, or the block's mixer."""
    layer = model.model.layers[block]
    return {"all": model, "block": layer, "mixer": layer.self_attn}[trainable]


def lockstep(setup: Setup) -> list[dict[str, float]]:
    """The row of every candidate, as from separate trainings."""
    blocks, rows = list(setup.blocks), list[dict[str, float]]()
    size = at_once(setup) if blocks else 1
    groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    countdown = Countdown("mmr", len(groups) * setup.config.mmr.steps)
    for number, group in enumerate(groups):
        countdown.title = f"mmr blocks {', '.join(map(str, group))} (group {number + 1}/{len(groups)})"
        losses = Group(setup, group).train(countdown)
        for block in group:
            rows.append(row_of(block, losses[block], setup.config.mmr))
            setup.report(block, rows[-1])
    return rows


def at_once(setup: Setup) -> int:
    """How many candidates fit in memory together: as the config says, else by what is free."""
    options = setup.config.mmr
    if options.halving or options.candidates_at_once:
        return options.candidates_at_once or len(setup.blocks)
    model = shared(setup, setup.blocks[0], {})
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    micro = setup.train.batch_size // setup.train.gradient_accumulation
    cached = micro * setup.rows[0]["input_ids"].shape[-1] * model.config.hidden_size * 4
    return max(1, int(SHARE * free_memory(model.device) / (COPIES * own + cached)))


def shared(setup: Setup, block: int, inputs: Mapping[int, Tensor]) -> Any:
    """The current model with ``block`` swapped, which has the current model's own tensors but for what is trained, and
    goes on from ``inputs[block]`` [B, T, E] in place of computing what lies below."""
    before = getattr(setup.model.config, "mixers", None) or [ATTENTION] * setup.model.config.num_hidden_layers
    placement = replace(before, [block], setup.mixer.of)
    model = hybridize(setup.model, placement, setup.mixer, seed=setup.seed, take=True)
    set_kernels(model, setup.kernels)
    layers = model.model.layers
    for below in range(block):
        layers[below].forward = lambda hidden_states, *args, **kwargs: hidden_states
    if block:
        layers[block - 1].forward = lambda *args, **kwargs: inputs[block]
    model.requires_grad_(False)
    part = trained_part(model, block, setup.config.mmr.trainable)
    for parameter in part.parameters():
        parameter.data = parameter.data.clone()
    part.requires_grad_(True)
    if setup.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


@contextmanager
def up_to(model: Any, block: int) -> Iterator[None]:
    """Within the context, ``block`` and the blocks above it are not computed."""
    with ExitStack() as stack:
        for above in range(block, len(model.model.layers)):
            stack.enter_context(block_as_identity(model, above))
        yield


class Candidate:
    """One block swapped: its model, and the optimizer and schedule that a trainer makes for it."""

    def __init__(self, setup: Setup, block: int, inputs: Mapping[int, Tensor]) -> None:
        self.block, self.model = block, shared(setup, block, inputs)
        self.own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        train, steps = schedule_of(setup), setup.config.mmr.steps
        trainer = DistillTrainer(
            model=self.model,
            args=training_arguments(train, steps, setup.scratch, setup.seed, setup.dtype),
            teacher=setup.teacher,
            loss=train.loss,
            temperature=train.temperature,
            mixer_learning_rate=train.mixer_learning_rate,
        )
        self.optimizer = trainer.create_optimizer()
        self.schedule: Any = trainer.create_scheduler(steps, self.optimizer)

    def update(self, max_norm: float) -> None:
        """One optimizer step, the gradient clipped by its norm (0: not)."""
        if max_norm > 0:
            clip_grad_norm_(self.own, max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


class Group:
    """Candidates that are trained together, batch by batch."""

    def __init__(self, setup: Setup, blocks: list[int]) -> None:
        self.setup = setup
        self.inputs: dict[int, Tensor] = {}
        self.candidates = [Candidate(setup, block, self.inputs) for block in blocks]

    def train(self, countdown: Countdown) -> dict[int, dict[int, float]]:
        """Train all candidates to the end, or to the rung at which they are dropped; by block, the held-out losses by
        step. Raises UserError where a loss is not finite, Stopped after a signal."""
        options, train = self.setup.config.mmr, self.setup.train
        losses = {block: {0: loss} for block, loss in self.heldout().items()}
        micro = train.batch_size // train.gradient_accumulation
        batches = iter(DataLoader(self.setup.rows, micro, collate_fn=collate, num_workers=train.data_workers))
        for step in range(1, options.steps + 1):
            self.step(step, [next(batches) for _ in range(train.gradient_accumulation)])
            countdown.step()
            if interrupt.asked():
                raise interrupt.Stopped(interrupt.number())
            if step not in rungs(options):
                continue
            for block, loss in self.heldout().items():
                losses[block][step] = loss
            if options.halving and step < options.steps:
                kept = survivors({each.block: losses[each.block][step] for each in self.candidates}, self.setup.added)
                self.candidates = [each for each in self.candidates if each.block in kept]
        return losses

    def step(self, step: int, window: list[dict[str, Tensor]]) -> None:
        """One optimizer step of every candidate on the micro-batches of a ``window``."""
        train = self.setup.train
        count = torch.stack([count_targets(batch["labels"]) for batch in window]).sum()
        progress = (step - 1) / max(self.setup.config.mmr.steps - 1, 1)
        totals: dict[int, Tensor] = {}
        for batch in window:
            for candidate, loss in self.losses(batch, count=count, progress=progress):
                loss.backward()
                totals[candidate.block] = totals.get(candidate.block, 0.0) + loss.detach()
        if not torch.stack(list(totals.values())).isfinite().all():
            block, loss = next((block, loss) for block, loss in totals.items() if not loss.isfinite())
            raise UserError(
                f"mmr: the loss of block {block} became {float(loss)} at step {step}: lower train.learning_rate (or "
                "train.mixer_learning_rate)"
            )
        for candidate in self.candidates:
            candidate.update(train.max_grad_norm)

    @torch.no_grad()
    def heldout(self) -> dict[int, float]:
        """By block, the mean loss in nats over the valid targets of the held-out rows."""
        rows, size = self.setup.heldout, self.setup.train.batch_size
        totals, count = {candidate.block: 0.0 for candidate in self.candidates}, 0
        for candidate in self.candidates:
            candidate.model.eval()
        for start in range(0, len(rows), size):
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            for candidate, loss in self.losses(batch, count=1.0):
                totals[candidate.block] += float(loss)
            count += int(count_targets(batch["labels"]))
        for candidate in self.candidates:
            candidate.model.train()
        return {block: total / max(count, 1) for block, total in totals.items()}

    def losses(self, batch: dict[str, Tensor], **options: Any) -> Iterator[tuple[Candidate, Tensor]]:
        """The loss of every candidate on a batch, one after the other, so that one has activations at a time."""
        model, train, teacher = self.setup.model, self.setup.train, self.setup.teacher
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        hidden = teacher.hidden(inputs)
        blocks = [candidate.block for candidate in self.candidates]
        with (
            torch.no_grad(),
            precision(self.setup),
            recording(model, blocks, self.inputs),
            up_to(model, max(blocks)),
        ):
            model.model(**inputs, use_cache=False)
        objective = partial(_loss, train.loss, hidden, teacher.head, labels, temperature=train.temperature, **options)
        for candidate in self.candidates:
            with precision(self.setup):
                loss = candidate.model(**inputs, use_cache=False, objective=objective).loss
            yield candidate, loss


def _loss(
    loss: str, teacher_hidden: Tensor, teacher_head: nn.Module, labels: Tensor, hidden: Tensor, head: nn.Module,
    **options: Any,
) -> Tensor:  # fmt: skip
    """``distillation_loss`` with its arguments in the order that a partial wants."""
    return distillation_loss(loss, hidden, head, teacher_hidden, teacher_head, labels, **options)
