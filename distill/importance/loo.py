"""Leave-one-out: I_l = P(model) - P(model with block l = identity), P = accuracy by log-likelihood.

Apriel-H1, section 3.1, equation (4), figure 1. The whole block (mixer and MLP) is replaced, nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill.importance import Setup


@contextmanager
def block_as_identity(model: Any, block: int) -> Iterator[None]:
    """Within the context, block ``block`` passes hidden states [B, T, E] through unchanged."""
    layers = model.model.layers
    if not 0 <= block < len(layers):
        raise ValueError(f"expected a block in [0, {len(layers)}), got {block}")
    original = layers[block].forward
    layers[block].forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        layers[block].forward = original


def order(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks from least to most important. Those within one standard error of the least important one not yet
    placed are a tie, broken by the mean log-likelihood of the right answer without the block (higher first)."""
    left = sorted(rows, key=lambda row: (row["score"], row["block"]))
    placed: list[int] = []
    while left:
        limit = left[0]["score"] + left[0]["stderr"]
        tie = [row for row in left if row["score"] <= limit]
        left = left[len(tie) :]
        placed += [int(row["block"]) for row in sorted(tie, key=lambda row: (-row["loglikelihood"], row["block"]))]
    return placed


@torch.no_grad()
def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by the accuracy that is lost when it is the identity."""
    base = setup.metric(setup.model)
    rows: list[dict[str, float]] = []
    for block in setup.blocks:
        with block_as_identity(setup.model, block):
            without = setup.metric(setup.model)
        row = {
            "block": block,
            "score": base["accuracy"] - without["accuracy"],
            "stderr": without["stderr"],
            "value": without["accuracy"],
            "loglikelihood": without["loglikelihood"],
        }
        rows.append(row)
        setup.report(block, row)
    return {
        "scorer": "loo",
        "metric": setup.config.loo.task,
        "questions": int(base["questions"]),
        "baseline": base["accuracy"],
        "baseline_stderr": base["stderr"],
        "blocks": rows,
        "order": order(rows),
    }
