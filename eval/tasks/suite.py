"""Datasets of the embedded lm-eval tasks, generated where they are used (seeded, so always the same)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from distill.data import suite


def generative(family: str, **_: Any) -> DatasetDict:
    """The held-out generative questions of one family, as split ``test``."""
    return DatasetDict({"test": Dataset.from_list(suite.generative(family))})


def choice(family: str = "", **_: Any) -> DatasetDict:
    """The held-out multiple-choice questions (of one family), as split ``test``."""
    rows = [row for row in suite.choice() if family in ("", row["family"])]
    return DatasetDict({"test": Dataset.from_list(rows)})
