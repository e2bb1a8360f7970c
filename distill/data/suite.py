"""The held-out suites of the embedded families: questions that training never sees (by their hash)."""

from __future__ import annotations

import random
from typing import Any

from distill.data.families import FAMILIES, corrupt, draw

GENERATIVE_PER_FAMILY = 100
CHOICE_PER_FAMILY = 120  # 600 in all
CHOICES = 4
SEED = 20251


def generative(family: str, count: int = GENERATIVE_PER_FAMILY) -> list[dict[str, Any]]:
    """``count`` distinct questions of a family: prompt, answer, distance."""
    rng = random.Random(f"generative/{family}/{SEED}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        example = draw(family, rng, held_out=True)
        found[example.prompt] = {
            "family": family,
            "prompt": example.prompt,
            "answer": example.answer,
            "distance": example.distance,
        }
    return list(found.values())


def choice(count_per_family: int = CHOICE_PER_FAMILY) -> list[dict[str, Any]]:
    """Multiple choice over whole completions: the right one among ``CHOICES``, the others each with one wrong
    symbol in the trace. Families alternate, so that any prefix of the suite is stratified."""
    by_family: list[list[dict[str, Any]]] = []
    for family in FAMILIES:
        rng = random.Random(f"choice/{family}/{SEED}")
        found: dict[str, dict[str, Any]] = {}
        while len(found) < count_per_family:
            example = draw(family, rng, held_out=True)
            if example.prompt in found:
                continue
            options = [example.completion]
            while len(options) < CHOICES:
                wrong = corrupt(example, rng)
                if wrong not in options:
                    options.append(wrong)
            rng.shuffle(options)
            found[example.prompt] = {
                "family": family,
                "prompt": example.prompt,
                "choices": options,
                "gold": options.index(example.completion),
                "distance": example.distance,
            }
        by_family.append(list(found.values()))
    return [row for rows in zip(*by_family, strict=True) for row in rows]
