"""Which mixer every block has, and the names H1-h/L that go with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from distill.errors import UserError

ATTENTION = "attention"


def hybrid_name(replaced: int, num_blocks: int) -> str:
    """``H1-25/50``: 25 of 50 blocks have a replaced mixer."""
    return f"H1-{replaced}/{num_blocks}"


def tuned_name(name: str, how: str = "SFT") -> str:
    """``H1-30/50-SFT``: a stage's model that was trained further (as the paper's H1-30-SFT)."""
    return f"{name}-{how}"


def parse_name(name: str) -> tuple[int, int | None]:
    """(h, L) of ``H1-25/50``; L is None for the short form ``H1-25``."""
    match = re.fullmatch(r"[Hh]1-(\d+)(?:/(\d+))?", name)
    if not match:
        raise UserError(f"'{name}' is no hybrid name; expected H1-h or H1-h/L, such as H1-5/10")
    return int(match[1]), int(match[2]) if match[2] else None


def replaced_blocks(mixers: Sequence[str]) -> list[int]:
    """Indices of the blocks whose mixer is not attention."""
    return [block for block, mixer in enumerate(mixers) if mixer != ATTENTION]


def replace(mixers: Sequence[str], blocks: Iterable[int], mixer: str | Callable[[int], str]) -> list[str]:
    """The placement with ``blocks`` given ``mixer`` (one for all, or by block); each must be in range and still have
    attention."""
    result = list(mixers)
    for block in blocks:
        if not 0 <= block < len(result):
            raise UserError(f"block {block} is out of range; expected a value in [0, {len(result)})")
        if result[block] != ATTENTION:
            raise UserError(f"block {block} already has mixer '{result[block]}'")
        result[block] = mixer if isinstance(mixer, str) else mixer(block)
    return result
