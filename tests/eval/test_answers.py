"""What of a text is its answer: reasoning, stop strings, and how a generation ended."""

from __future__ import annotations

import pytest

from eval.answers import EMPTY, ENDED, TRUNCATED, Answer, Reasoning, Tally, answer_of

THINK = Reasoning("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "prompt", "behind"),
    [
        ("<think>1 2</think>\n\n3", "", "3"),
        ("<think>a</think>b<think>c</think>d", "", "d"),
        ("plain", "", "plain"),
        ("<think>1 2", "", None),
        ("1 2", "<|assistant|><think>\n", None),
        ("1 2</think>3", "<|assistant|><think>\n", "3"),
        ("plain", "Write <think> first.<|assistant|>", "plain"),
        ("<think>1</think>    indented", "", "    indented"),
    ],
)
def test_the_text_behind_the_reasoning(text: str, prompt: str, behind: str | None) -> None:
    assert THINK.behind(text, prompt) == behind
    assert Reasoning().behind(text, prompt) == text


@pytest.mark.parametrize(
    ("text", "ended", "answer"),
    [
        ("<think>Q: no</think>4 Q: more", False, Answer("4 ", ENDED)),
        ("<think>Q: still", False, Answer("", TRUNCATED)),
        ("<think>Q: still", True, Answer("", EMPTY)),
        ("<think>a</think>", True, Answer("", EMPTY)),
        ("", True, Answer("", EMPTY)),
        ("Q: at once", True, Answer("", EMPTY)),
        ("42", False, Answer("42", TRUNCATED)),
        ("42", True, Answer("42", ENDED)),
    ],
)
def test_stop_strings_count_behind_the_reasoning(text: str, ended: bool, answer: Answer) -> None:
    assert answer_of(text, ("Q:",), THINK, ended=ended) == answer


def test_of_several_stop_strings_the_first_in_the_text_cuts() -> None:
    assert answer_of("a\n\nb. c", (".", "\n\n"), THINK, ended=False).text == "a"


def test_counts_are_summed_over_tasks() -> None:
    tally = Tally()
    for task, how in (("a", TRUNCATED), ("a", ENDED), ("b", TRUNCATED), ("b", EMPTY)):
        tally.add(task, Answer("", how))
    tally.prompts["b"] += 2
    assert tally.of(["a", "b"]) == {"cut": 2, "truncated": 2, "empty": 1}
    assert tally.of(["choices"]) == {"cut": 0}, "of likelihoods nothing is truncated"
