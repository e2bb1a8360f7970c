"""Aligned: the held-out loss after swapping one block for a mixer that has learned to give what its attention gives.

All candidates are aligned in one short training (``alignment.py``); each is then put into the current model by itself,
and the distillation loss is taken on fixed held-out tokens, blocks below it shared. No training is repeated a
candidate, which is what MMR costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from distill.importance import Setup
from distill.importance.alignment import Aligned, align, in_dtype, swapped
from distill.importance.mixer_store import MixerStore
from distill.importance.prefixes import Variation, heldout_losses

NEEDS = ("rows",)


def order(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks from least to most important: by the loss with the block swapped."""
    return [int(row["block"]) for row in sorted(rows, key=lambda row: (row["score"], row["block"]))]


def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by the held-out loss of the current model with it swapped for its aligned mixer."""
    aligned, mixers = aligned_mixers(setup)
    variations = [Variation(block, partial(swapped, setup.model, {block: mixers[block]})) for block in setup.blocks]
    base, losses = heldout_losses(setup, nullcontext, variations, tokens=setup.config.aligned.heldout_tokens)
    rows: list[dict[str, float]] = []
    for block, loss in zip(setup.blocks, losses, strict=True):
        row = {"block": block, "score": loss, **errors_of(aligned, block)}
        rows.append(row)
        setup.report(block, row)
    return {"scorer": "aligned", **described(setup), "baseline": base, "blocks": rows, "order": order(rows)}


def aligned_mixers(setup: Setup) -> tuple[Aligned, dict[int, nn.Module]]:
    """The aligned mixers of all candidates, kept ones read again; and the same as the current model can run them."""
    aligned = align(
        setup.model,
        setup.blocks,
        setup.rows,
        setup.mixer,
        setup.config.aligned,
        batch_size=setup.train.batch_size,
        seed=setup.seed,
        kernels=setup.kernels,
        dtype=setup.dtype,
        store=None if setup.kept is None else MixerStore(setup.kept, setup.fingerprint),
        say=lambda line: print(f"  {line}", flush=True),
    )
    return aligned, in_dtype(aligned.mixers, setup.model.dtype)


def errors_of(aligned: Aligned, block: int) -> dict[str, float]:
    """The relative errors of a block's mixer, for its row."""
    start, end = aligned.errors[block]
    return {"error_start": start, "error_end": end}


def described(setup: Setup) -> dict[str, Any]:
    """What was done, for the record."""
    options = setup.config.aligned
    rows, length = len(setup.heldout), setup.heldout[0]["input_ids"].shape[-1]
    return {
        "steps": options.steps,
        "loss": setup.train.loss,
        "heldout_tokens": min(rows, -(-options.heldout_tokens // length)) * length,
    }
