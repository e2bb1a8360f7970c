"""The candidates of a score, and what is known of each already: a score that was cut short goes on from there.

While a score is under way, ``score.partial/candidates`` holds ``003.json``, the record of the fourth candidate, where a
process of its own has made it (a task of a job array); ``rank-001.json``, that of all candidates of one process of a
job; and ``rows/007.json``, the row of block 7, as soon as it is known. All have the fingerprint of the step: what was
scored with other inputs does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.placement import ATTENTION
from distill.records import Step, read_record, write_json
from distill.schedule import Stage
from stages.context import Context


def candidates(context: Context, stage: Stage) -> list[int]:
    """The blocks to score, ascending: those that still have attention, or of ``score.blocks`` those that do."""
    _, mixers = context.before(stage)
    listed = context.config.score.blocks
    return [block for block, mixer in enumerate(mixers) if mixer == ATTENTION and (not listed or block in listed)]


@dataclass(frozen=True)
class Known:
    """What is known of the candidates of one score, in ``folder``."""

    folder: Path
    fingerprint: str

    def records(self) -> dict[int, dict[str, Any]]:
        """By block, its record: as if it had been scored alone."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.json")):
            part = read_record(path, fingerprint=str, record=dict)
            if part["fingerprint"] == self.fingerprint:
                record = part["record"]
                found |= {
                    row["block"]: {**record, "blocks": [row], "order": [row["block"]]} for row in record["blocks"]
                }
        return found

    def rows(self, blocks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """By block, the rows that are known of ``blocks``."""
        found = {}
        for path in sorted((self.folder / "rows").glob("*.json")):
            part = read_record(path, fingerprint=str, row=dict)
            if part["fingerprint"] == self.fingerprint and part["row"]["block"] in blocks:
                found[part["row"]["block"]] = part["row"]
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Note the row of a candidate, at once and for good."""
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "rows" / f"{row['block']:03d}.json", {"fingerprint": self.fingerprint, "row": row})

    def put(self, name: str, record: dict[str, Any]) -> None:
        """Note the record of one candidate or several."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{name}.json", {"fingerprint": self.fingerprint, "record": record})


def known(step: Step, number: int = 0) -> Known:
    """What is known of the candidates of the score that decides (0), or of the others that are compared with it."""
    folder = step.partial / "candidates"
    return Known(folder / f"compare-{number}" if number else folder, step.fingerprint)


def chosen(blocks: Sequence[int], index: int, name: str) -> int:
    """The candidate that ``--candidate`` names by its place."""
    if not 0 <= index < len(blocks):
        raise UserError(
            f"{name}: no candidate {index}; expected a value in [0, {len(blocks)}), one for each of the blocks {blocks}"
        )
    return blocks[index]
