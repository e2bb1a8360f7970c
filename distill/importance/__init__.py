"""Importance scores: one file each, whose name is the registered name.

Each has ``score(setup: Setup) -> dict`` with ``scorer``, ``blocks`` (a row for every candidate: ``block``,
``score``, and what went into it), ``order`` (the candidates, least important first) and what was measured on the way.
A score with ``order(rows) -> list[int]`` besides has rows that do not depend on each other: its candidates can be
scored apart, by other processes or in another session, and joined; any other is computed in one piece. Whoever calls a
score has its rows looked at by ``checks.check_rows`` before an order is made use of.
``NEEDS`` says what of a ``Setup`` a score reads: ``metric`` (questions), ``tasks`` (questions of several tasks),
``rows`` (of training, and held-out ones).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import MixerConfig, ScoreConfig, TrainConfig
from distill.errors import choose
from distill.teacher import Teacher

Variant = Callable[[], AbstractContextManager[None]]
"""Makes a context within which a model computes something else (a block left out)."""

Metric = Callable[[Any, Sequence[Variant]], Sequence[Mapping[str, float]]]
"""``metric(model, variants) -> [{"accuracy", "stderr", "loglikelihood", "questions"}, ...]``: what LOO needs of an
evaluation. Batch by batch, every variant in turn, so that variants may share what a batch has in common."""


PARTS = ("alignment", "checks", "comparison", "halving", "lockstep", "mixer_store", "prefixes", "search")
"""Modules that are no scores themselves."""


@dataclass(frozen=True)
class Setup:
    """All that a score may use; what it does not need (``NEEDS``) may be None.

    Attributes:
        model: the current model (teacher or hybrid); left as it was.
        teacher: the frozen teacher.
        blocks: candidates, all of which have attention.
        metric: accuracy of variants of a model on prepared log-likelihood requests.
        rows: training rows; heldout: fixed rows, never trained on.
        report: called with (block, row) as each candidate is done.
        added: how many blocks the stage is to replace.
        kept: where mixers that a score has trained are kept, to be read again by this score or by the step that swaps
            (None: nowhere); ``fingerprint``: of all that they depend on.
        tasks: ``tasks(names, questions)``: as ``metric``, of other questions: so many of several tasks together.
    """

    model: Any
    teacher: Teacher
    blocks: Sequence[int]
    metric: Metric
    rows: Any
    heldout: Any
    config: ScoreConfig
    train: TrainConfig
    mixer: MixerConfig
    seed: int
    kernels: str
    dtype: str
    scratch: Path
    report: Callable[[int, dict[str, float]], None]
    added: int = 1
    kept: Path | None = None
    fingerprint: str = ""
    tasks: Callable[[Sequence[str], int], Metric] | None = None


OPTIONS = {"greedy": "aligned", "kl_restore": "aligned"}
"""Scores whose options are those of another."""
COMBINED = "combine"
"""The score that other scores go into."""


def parts(config: ScoreConfig, name: str) -> list[str]:
    """The scores that the score ``name`` takes: itself, or those that it combines."""
    return config.combine if name == COMBINED else [name]


def taken(config: ScoreConfig, *decide: str) -> list[str]:
    """Names of the scores that are taken: those that ``decide``, those of ``score.compare``, and what these combine."""
    named = [*decide, *(text.split()[0] for text in config.compare if text.strip())]
    return list(dict.fromkeys(each for name in named for each in (name, *parts(config, name))))


def needs(config: ScoreConfig, name: str) -> frozenset[str]:
    """What the score ``name`` reads of a ``Setup``."""
    return frozenset(
        need for part in parts(config, name) for need in importlib.import_module(f"{__name__}.{part}").NEEDS
    )


def available() -> list[str]:
    """Names of the scores: the modules here that are no part of another."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in PARTS)


def scorer(name: str) -> Callable[[Setup], dict[str, Any]]:
    """The ``score`` function registered under ``name``."""
    choose("importance score", name, available())
    function: Callable[[Setup], dict[str, Any]] = importlib.import_module(f"{__name__}.{name}").score
    return function


def apart(name: str) -> bool:
    """Whether candidates can be scored apart by the score ``name``."""
    return hasattr(importlib.import_module(f"{__name__}.{name}"), "order")


def join(
    name: str, records: Sequence[Mapping[str, Any]], config: ScoreConfig | None = None, added: int = 1
) -> dict[str, Any]:
    """One record of the ``records`` that the score ``name`` has of disjoint candidates: as if scored together.

    ``config`` and ``added`` (how many blocks are to be replaced) are for what a score says of all of its candidates.
    """
    module: Any = importlib.import_module(f"{__name__}.{name}")
    rows = sorted((row for record in records for row in record["blocks"]), key=lambda row: row["block"])
    joined = {**records[0], "blocks": rows, "order": module.order(rows)}
    if config is not None and hasattr(module, "complete"):
        joined = module.complete(joined, config, added)
    return joined


def by_score(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Blocks by their scores, the lowest first; of equal ones the first."""
    return [int(row["block"]) for row in sorted(rows, key=lambda row: (row["score"], row["block"]))]


def assigned(setup: Setup, name: str, score: Callable[[int], float]) -> dict[str, Any]:
    """The record of a score that nothing is measured for: each block's depends on the block alone."""
    rows = [{"block": block, "score": float(score(block))} for block in setup.blocks]
    for row in rows:
        setup.report(int(row["block"]), row)
    return {"scorer": name, "blocks": rows, "order": by_score(rows)}
