"""Datasets of the embedded lm-eval tasks, generated where they are used (seeded, so always the same)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from distill.data import suite


def generative(family: str, **_: Any) -> DatasetDict:
    """The held-out generative questions of one family, as split ``test``."""
    return DatasetDict({"test": Dataset.from_list(suite.generative(family))})


def choice(**_: Any) -> DatasetDict:
    """The held-out multiple-choice questions, as split ``test``."""
    return DatasetDict({"test": Dataset.from_list(suite.choice())})
