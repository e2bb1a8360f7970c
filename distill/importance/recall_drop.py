"""Recall against the rest: what a block without attention costs on recall, over what it costs elsewhere (HALO).

Hybrid Linear Attention Done Right (arXiv 2601.22156): with R_l and C_l the accuracies on recall and on other tasks of
the model in which block l alone is converted,

    s_l = (max_i R_i - R_l) / (max_i C_i - C_l + epsilon),

so that attention stays where it is needed for recall rather than for everything. HALO's block l has a linear mixer
that was aligned before; here it is the identity, as in leave-one-out, which trains nothing. Epsilon is one question of
the rest (HALO's 1e-10 makes the score of a block that loses nothing elsewhere a matter of one question on recall). The
ratio says where the loss lies and not how large it is: a block that all tasks need has a score of about 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from distill.importance import Setup
from distill.importance.loo import recording, without

NEEDS = ("tasks",)


def ordered(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks by score, then by the mean log-likelihood of the right answers on recall (higher first)."""
    found = sorted(rows, key=lambda row: (row["score"], -row["loglikelihood"], row["block"]))
    return [int(row["block"]) for row in found]


@torch.no_grad()
def score(setup: Setup) -> dict[str, Any]:
    """Score every candidate by the ratio above; it takes all of them to score one."""
    options = setup.config.recall_drop
    assert setup.tasks is not None
    figures = {}
    for kind, tasks in (("recall", options.recall), ("rest", options.rest)):
        inputs: dict[int, torch.Tensor] = {}
        variants = [partial(recording, setup.model, setup.blocks, inputs)]
        variants += [partial(without, setup.model, block, inputs) for block in setup.blocks]
        figures[kind] = setup.tasks(tasks, options.questions)(setup.model, variants)
    (base, *recall), (other, *rest) = figures["recall"], figures["rest"]
    best = {kind: max(row["accuracy"] for row in found[1:]) for kind, found in figures.items()}
    rows: list[dict[str, float]] = []
    for block, on_recall, on_rest in zip(setup.blocks, recall, rest, strict=True):
        dropped = best["recall"] - on_recall["accuracy"], best["rest"] - on_rest["accuracy"]
        row = {
            "block": block,
            "score": dropped[0] / (dropped[1] + 1 / other["questions"]),
            "recall": on_recall["accuracy"],
            "rest": on_rest["accuracy"],
            "loglikelihood": on_recall["loglikelihood"],
        }
        rows.append(row)
        setup.report(block, row)
    return {
        "scorer": "recall_drop",
        "metric": f"{', '.join(options.recall)} against {', '.join(options.rest)}",
        "questions": int(base["questions"] + other["questions"]),
        "baseline": base["accuracy"],
        "baseline_rest": other["accuracy"],
        "blocks": rows,
        "order": ordered(rows),
    }
