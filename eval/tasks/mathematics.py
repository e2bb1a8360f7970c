"""Whether a mathematical answer is the expected one: equal as numbers, or as LaTeX by lm-eval's normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.prompts import is_correct

ASK = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def question(doc: Mapping[str, Any]) -> str:
    """What is asked; data sets call it ``problem`` or ``question``."""
    return str(doc.get("problem") or doc["question"]) + ASK


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """``exact_match`` of the last ``\\boxed{...}``, or of all that was said."""
    from lm_eval.tasks.aime.utils import process_results as same_latex

    right = is_correct(results[0], str(doc["answer"])) or same_latex(dict(doc), list(results))["exact_match"]
    return {"exact_match": int(bool(right))}
