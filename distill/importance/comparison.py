"""Several scores of the same candidates: which are taken, and how far their orders agree with the one that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from distill.config import ScoreConfig
from distill.config_merge import merge_config
from distill.errors import UserError, choose
from distill.importance import OPTIONS, apart, available


@dataclass(frozen=True)
class Entry:
    """One score to take: ``name`` as in the config (``mmr trainable=mixer``), and its options."""

    name: str
    scorer: str
    options: ScoreConfig

    @property
    def apart(self) -> bool:
        """Whether each candidate can be scored without the others."""
        return apart(self.scorer) and not (self.scorer == "mmr" and self.options.mmr.halving)


def entries(options: ScoreConfig, scorer: str) -> list[Entry]:
    """The score that decides, then those of ``score.compare``, each once; UserError for one that there is not."""
    found = [Entry(scorer, scorer, options)]
    kind: Any = ScoreConfig
    for text in options.compare:
        name, *own = text.split() or [text]
        choose("score.compare", name, available())
        if own and not is_dataclass(getattr(options, OPTIONS.get(name, name), None)):
            raise UserError(f"score.compare: '{text}': {name} has no options of its own; give {name} alone")
        if text in {entry.name for entry in found}:
            continue
        overrides = [f"{OPTIONS.get(name, name)}.{each}" for each in own]
        found.append(Entry(text, name, merge_config(kind, [("score", asdict(options))], overrides)))
    return found


def spearman(one: Sequence[int], other: Sequence[int]) -> float:
    """Rank correlation of two orders of the same blocks; 1.0 of fewer than two."""
    if len(one) < 2:
        return 1.0
    places = [[list(order).index(block) for block in sorted(one)] for order in (one, other)]
    correlation: Any = np.corrcoef(places)
    return float(correlation[0, 1])


def compared(record: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], added: int) -> list[dict[str, Any]]:
    """For each of ``others`` (by name): its rank correlation with the ``record`` that decides, how many of the
    ``added`` blocks it would have chosen as well, its order and its rows."""
    chosen = set(record["order"][:added])
    return [
        {
            "scorer": name,
            "spearman": round(spearman(record["order"], other["order"]), 4),
            "same_choice": len(chosen & set(other["order"][:added])),
            "order": other["order"],
            "blocks": other["blocks"],
        }
        for name, other in others.items()
    ]
