"""What of a generated text is its answer: behind the reasoning, before a stop string; and how each one ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ENDED, TRUNCATED, EMPTY = "ended", "truncated", "empty"


@dataclass(frozen=True)
class Reasoning:
    """The marks around a model's reasoning, ``<think>`` and ``</think>``; without ``end`` nothing is reasoning."""

    start: str = ""
    end: str = ""

    def behind(self, text: str, prompt: str = "") -> str | None:
        """``text`` behind the last ``end`` mark, or all of it where no reasoning began; None where it goes on still.

        Where the ``prompt`` ends with the start mark, as those of some chat templates do, it has begun there.
        """
        if not self.end:
            return text
        _, mark, answer = text.rpartition(self.end)
        if mark:
            return answer.lstrip("\n")
        begun = self.start and (self.start in text or prompt.rstrip().endswith(self.start))
        return None if begun else text


@dataclass(frozen=True)
class Answer:
    """What is matched of one generation, and how it ended: ``ended``, ``truncated`` (it reached the longest length
    allowed before it ended) or ``empty`` (it ended and gave no text)."""

    text: str
    how: str


def cut(text: str, stops: Iterable[str]) -> tuple[str, bool]:
    """``text`` before the first of the stop strings, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def answer_of(text: str, stops: Sequence[str], reasoning: Reasoning, *, prompt: str = "", ended: bool) -> Answer:
    """The answer in a generated text; ``ended``: an end token followed it. Stop strings count behind the reasoning."""
    behind = reasoning.behind(text, prompt)
    answer, stopped = cut(behind or "", stops)
    if not (ended or stopped):
        return Answer(answer, TRUNCATED)
    return Answer(answer, ENDED if answer.strip() else EMPTY)


class Tally:
    """How the generations of each task ended, and how many of its prompts were cut to fit the model's window."""

    def __init__(self) -> None:
        self.ends: dict[str, Counter[str]] = {}
        self.prompts: Counter[str] = Counter()

    def add(self, task: str, answer: Answer) -> None:
        self.ends.setdefault(task, Counter())[answer.how] += 1

    def of(self, tasks: Iterable[str]) -> dict[str, int]:
        """Counts over ``tasks``, as in a record: generations ``truncated`` and ``empty``, prompts ``cut``."""
        tasks = list(tasks)
        generated = [self.ends[task] for task in tasks if task in self.ends]
        found = {"cut": sum(self.prompts[task] for task in tasks)}
        if generated:
            found |= {how: sum(each[how] for each in generated) for how in (TRUNCATED, EMPTY)}
        return found
