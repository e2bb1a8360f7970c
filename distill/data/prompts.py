"""What a teacher is asked when it makes traces, and whether its answer is right.

Prompts come from a JSONL file (``prompt`` or ``messages``, and an optional ``answer``) or from the training side of
the embedded families.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from typing import Any

from distill.data.examples import check_messages
from distill.data.families import FAMILIES, draw
from distill.data.jsonl import read_rows
from distill.errors import UserError, nearest

END_OF_THOUGHT = "</think>"
BOXED = "\\boxed{"
NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*|(?=\.))(\.[0-9]+)?([eE][+-]?[0-9]{1,4})?")
"""A number. Digits after a leading zero are none: 0125 is a string of digits, another answer than 125."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and the answer that is expected, if one is known."""

    messages: list[dict[str, str]]
    answer: str | None = None
    plain: bool = False
    """One text of the user's, which can also be put to a model without a chat template."""
    where: str = ""
    """File and line, for messages."""


def embedded_prompts(count: int, seed: int) -> list[Prompt]:
    """``count`` distinct questions from the training side of the split, the families in turn; the first n
    do not depend on ``count``."""
    rng = random.Random(f"prompts/{seed}")
    found: dict[str, Prompt] = {}
    for family in cycle(FAMILIES):
        if len(found) == count:
            break
        while True:
            example = draw(family, rng, held_out=False)
            if example.prompt not in found:
                break
        found[example.prompt] = Prompt(example.messages[:-1], example.answer, plain=True)
    return list(found.values())


def read_prompts(path: Path, limit: int = 0) -> list[Prompt]:
    """The prompts of a JSONL file (the first ``limit``; 0: all), every row checked.

    Raises UserError that names file and line for a row that has no prompt, and where there is no row at all.
    """
    rows = read_rows(path, parse_prompt)
    prompts = [replace(prompt, where=f"{path}:{number}") for number, prompt in rows]
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts[:limit] if limit else prompts


def parse_prompt(row: Any) -> Prompt:
    """A row with ``prompt`` or ``messages`` (cut after the last user turn), and perhaps ``answer``."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be a mapping, not {type(row).__name__}")
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise UserError(f"answer must be text or a number, not {row['answer']!r}")
    if "messages" in row:
        check_messages(row["messages"])
        asked = [i for i, message in enumerate(row["messages"]) if message["role"] == "user"]
        if not asked:
            raise UserError("messages must have a user turn")
        return Prompt(row["messages"][: asked[-1] + 1], answer)
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise UserError(f"prompt must be text that is not empty, not {row['prompt']!r}")
        return Prompt([{"role": "user", "content": row["prompt"]}], answer, plain=True)
    hint = next((hint for key in row if (hint := nearest(key, ("messages", "prompt")))), "")
    raise UserError(f"needs prompt or messages; has {', '.join(row) or 'nothing'}{hint}")


def answers_of(completion: str) -> list[str]:
    r"""What a completion may be giving as its answer: the text after the last ``</think>`` (all of it, if there is
    none), and the last ``\boxed{...}`` in that text."""
    text = completion.rpartition(END_OF_THOUGHT)[2]
    boxed = _last_boxed(text)
    return [text] if boxed is None else [text, boxed]


def is_correct(completion: str, answer: str) -> bool:
    """Whether a completion gives ``answer``, both normalised, as numbers where both are numbers."""
    return any(_same(given, answer) for given in answers_of(completion))


def normalise(answer: str) -> str:
    """An answer without surrounding space, a trailing full stop, and the commas between thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer.strip().removesuffix(".").strip())


def _same(a: str, b: str) -> bool:
    a, b = normalise(a), normalise(b)
    if NUMBER.fullmatch(a) and NUMBER.fullmatch(b):
        return Decimal(a) == Decimal(b)
    return a == b


def _last_boxed(text: str) -> str | None:
    r"""The contents of the last ``\boxed{...}``, whose braces may nest; None where there is no whole one."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def key_of(messages: Sequence[dict[str, str]], completion: str) -> tuple[Any, ...]:
    """What makes two traces the same: every turn, and the completion."""
    return (*((message["role"], message["content"]) for message in messages), completion)
