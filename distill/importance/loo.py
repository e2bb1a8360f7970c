"""Leave-one-out: I_l = P(model) - P(model with block l = identity), P = accuracy by log-likelihood.

Apriel-H1, section 3.1, equation (4), figure 1. The whole block (mixer and MLP) is replaced, nothing is trained.
Below block l the model without it is the model itself, so one pass of the model keeps every block's input, and the
model without block l goes on from there: the same scores in about half the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from distill.importance import Setup

NEEDS = ("metric",)


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


@contextmanager
def recording(model: Any, blocks: Sequence[int], inputs: dict[int, torch.Tensor]) -> Iterator[None]:
    """Within the context, ``inputs[block]`` is what each of ``blocks`` was last given, [B, T, E]."""

    def keep(block: int) -> Any:
        return lambda module, args, kwargs: inputs.update({block: args[0] if args else kwargs["hidden_states"]})

    layers = model.model.layers
    hooks = [layers[block].register_forward_pre_hook(keep(block), with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without(model: Any, block: int, inputs: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within the context, ``block`` is the identity, and what comes up to it is not computed but taken from ``inputs``
    (a pass over the same batch has recorded them)."""
    with ExitStack() as stack:
        for below in range(block):
            stack.enter_context(block_as_identity(model, below))
        stack.enter_context(block_as_identity(model, block))
        model.model.layers[block].forward = lambda *args, **kwargs: inputs[block]
        yield


def order(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks from least to most important. Those within one standard error of the least important one not yet
    placed are a tie, broken by the mean log-likelihood of the right answer without the block (higher first)."""
    left = sorted(rows, key=lambda row: (row["score"], row["block"]))
    placed: list[int] = []
    while left:
        limit = left[0]["score"] + left[0]["stderr"]
        tie = [row for row in left if row["score"] <= limit] or left[:1]  # NaN is below nothing
        left = left[len(tie) :]
        placed += [int(row["block"]) for row in sorted(tie, key=lambda row: (-row["loglikelihood"], row["block"]))]
    return placed


@torch.no_grad()
def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by the accuracy that is lost when it is the identity."""
    inputs: dict[int, torch.Tensor] = {}
    variants = [partial(recording, setup.model, setup.blocks, inputs)]
    variants += [partial(without, setup.model, block, inputs) for block in setup.blocks]
    base, *others = setup.metric(setup.model, variants)
    rows: list[dict[str, float]] = []
    for block, figures in zip(setup.blocks, others, strict=True):
        row = {
            "block": block,
            "score": base["accuracy"] - figures["accuracy"],
            "stderr": figures["stderr"],
            "value": figures["accuracy"],
            "loglikelihood": figures["loglikelihood"],
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
