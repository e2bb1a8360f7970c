"""Variants of a model that share what lies below the block in which they differ.

One pass of the model over a batch keeps what every block was given; a variant that differs from block l on goes on from
there, through blocks l, l + 1, ... and the final norm: what it gives is what the whole pass would, bit for bit.

Legend: B = rows, T = tokens a row, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.data.pack import IGNORE
from distill.hybrid.model import head_input
from distill.hybrid.reading import documents_marked
from distill.importance import Setup
from distill.importance.alignment import batch_of
from distill.losses import distillation_loss

Within = Callable[[], AbstractContextManager[None]]
"""Makes a context within which the model computes something else."""


@dataclass(frozen=True)
class Recording:
    """A pass of a model over a batch: what each block was given, and the states behind the final norm [B, T, E]."""

    model: Any
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    end: Tensor

    def hidden(self, block: int) -> Tensor:
        """The states behind the final norm [B, T, E] of the model as it is now, which below ``block`` is as it was."""
        (states, *_), _ = self.calls[block]
        for layer, ((_, *rest), options) in zip(self.model.model.layers[block:], self.calls[block:], strict=True):
            states = layer(states, *rest, **options)
        return self.model.model.norm(states)


@torch.no_grad()
def record(model: Any, inputs: Mapping[str, Tensor]) -> Recording:
    """Run ``model`` over a batch and keep what every block was given."""
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        options = dict(kwargs)
        states = args or (options.pop("hidden_states"),)
        calls.append((states, options))

    with documents_marked(model):
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
        try:
            end = model.model(**inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
    return Recording(model, calls, end)


@dataclass(frozen=True)
class Variation:
    """The model within a context, in which it differs from block ``block`` on."""

    block: int
    within: Within


@torch.no_grad()
def heldout_losses(
    setup: Setup, within: Within, variations: Sequence[Variation], *, tokens: int = 0
) -> tuple[float, list[float]]:
    """The held-out loss of the model of ``setup`` ``within`` a context, and there of each of its variations, in nats a
    valid target: what ``distill.trainer.heldout_loss`` gives of each as a whole.

    ``tokens``: how many held-out tokens are used (0: all).
    """
    model = setup.model
    count, totals = 0, [0.0] * (1 + len(variations))
    for batch in heldout_batches(setup, tokens):
        labels = batch.pop("labels")
        teacher = setup.teacher.hidden(batch)  # before the model is changed, which may be the teacher's own

        def loss(states: Tensor, teacher: Tensor = teacher, labels: Tensor = labels) -> float:
            return float(
                distillation_loss(
                    setup.train.loss,
                    head_input(model, states),
                    model.lm_head,
                    teacher,
                    setup.teacher.head,
                    labels,
                    temperature=setup.train.temperature,
                    count=1.0,
                )
            )

        with within():
            recording = record(model, batch)
            totals[0] += loss(recording.end)
            for place, variation in enumerate(variations, 1):
                with variation.within():
                    totals[place] += loss(recording.hidden(variation.block))
        count += int((labels[:, 1:] != IGNORE).sum())
    base, *others = (total / max(count, 1) for total in totals)
    return base, others


def heldout_batches(setup: Setup, tokens: int = 0) -> Iterator[dict[str, Tensor]]:
    """The held-out rows in batches, as many as hold ``tokens`` (0: all)."""
    rows, size = setup.heldout, setup.train.batch_size
    wanted = -(-tokens // rows[0]["input_ids"].shape[-1]) if tokens else len(rows)
    for start in range(0, min(wanted, len(rows)), size):
        yield batch_of(rows, start, min(size, wanted - start), setup.model.device)
