"""Successive halving: the worse half of the candidates is dropped at a quarter and at half of the steps.

Jamieson and Talwalkar, 2016 (arXiv 1502.07943). Learning rates are those of the full number of steps, so that the loss
of a candidate at a rung is what it has there in a full training: from the rungs of a full training follows what halving
would have chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.config import MmrConfig

Rows = Sequence[Mapping[str, float]]


def rungs(options: MmrConfig) -> list[int]:
    """The steps after which held-out losses are taken, ascending; the last is the end."""
    early = (options.steps // 4, options.steps // 2) if options.halving or options.halving_check else ()
    return [*sorted({step for step in early if step > 0}), options.steps]


def survivors(losses: Mapping[int, float], added: int) -> list[int]:
    """Of the blocks with these losses the better half, ascending; never fewer than ``added`` are to be chosen."""
    count = max(-(-len(losses) // 2), min(added, len(losses)))
    return sorted(sorted(losses, key=lambda block: (losses[block], block))[:count])


def steps_of(count: int, options: MmrConfig, added: int) -> int:
    """The steps that ``count`` candidates are trained in all."""
    stops, total = (rungs(options) if options.halving else [options.steps]), 0
    for before, stop in zip([0, *stops], stops, strict=False):
        total += (stop - before) * count
        count = max(-(-count // 2), min(added, count))
    return total


def row_of(block: int, losses: Mapping[int, float], options: MmrConfig) -> dict[str, float]:
    """The row of a candidate from its losses by step: at 0, at the rungs that it reached, and at its last."""
    last = max(losses)
    row = {"block": block, "score": losses[last], "loss_start": losses[0], "loss_end": losses[last]}
    row |= {f"loss_{step}": losses[step] for step in rungs(options)[:-1] if step in losses}
    return {**row, "steps": last} if options.halving else row


def order(rows: Rows) -> list[int]:
    """Blocks from least to most important: by the last loss, those that were dropped behind those that went further."""
    return [
        int(row["block"]) for row in sorted(rows, key=lambda row: (-row.get("steps", 0), row["score"], row["block"]))
    ]


def summary(rows: Rows, options: MmrConfig, added: int) -> dict[str, Any]:
    """What halving saved, of a score that used it; what it would have chosen and saved, of one that took the losses at
    the rungs of every candidate; nothing of any other."""
    if not rows:
        return {}
    steps = rungs(options)
    full = options.steps * len(rows)
    if options.halving:
        run = int(sum(row["steps"] for row in rows))
        return {"halving": {"rungs": steps, "steps_run": run, "steps_full": full, "saved": round(1 - run / full, 4)}}
    if not options.halving_check:
        return {}
    alive = {int(row["block"]): row for row in rows}
    for step in steps[:-1]:
        kept = survivors({block: row[f"loss_{step}"] for block, row in alive.items()}, added)
        alive = {block: alive[block] for block in kept}
    run = steps_of(len(rows), replace(options, halving=True), added)
    chosen, would = sorted(order(rows)[:added]), sorted(order(list(alive.values()))[:added])
    return {
        "halving": {
            "rungs": steps,
            "would_choose": would,
            "changes_choice": would != chosen,
            "would_save": round(1 - run / full, 4),
        }
    }
