"""The held-out suites: enough distinct questions, one right choice each, and the same for ever."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from typing import Any

import pytest

from distill.data.families import FAMILIES, Example, corrupt, is_held_out
from distill.data.suite import CHOICE_PER_FAMILY, CHOICES, GENERATIVE_PER_FAMILY, choice, generative

# Scores are comparable only over the same questions: a change here makes every measured number incomparable.
CHOICE_SUM = "56d24a1688d2523f"
GENERATIVE_SUMS = {
    "add": "079ffa7859aaa298",
    "mod": "6814927e9c0a70e8",
    "chase": "d2e4560ed09259af",
    "recall": "f7bf1ea70c9b60c9",
    "sort": "6f9a15be5a609e0c",
}


def checksum(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return choice()


def solve(prompt: str) -> tuple[str, str]:
    """(trace, answer) of a question, worked out from its text alone."""
    family, *rest = prompt.split(" ")
    if family == "add":
        a, b = rest[0].split("+")
        steps, carry = [], 0
        for x, y in zip(reversed(a), reversed(b), strict=True):
            total = int(x) + int(y) + carry
            steps.append(f"{x}+{y}+{carry}={total}")
            carry = total // 10
        return " ".join(steps), str(int(a) + int(b))
    if family == "mod":
        modulus, text = int(rest[0]), rest[1].replace("(", "").replace(")", "")
        value, steps = int(text[0]), []
        for op, operand in zip(text[1::2], text[2::2], strict=True):
            result = eval(f"{value}{op}{operand}") % modulus
            steps.append(f"{value}{op}{operand}={result}")
            value = result
        return " ".join(steps), str(value)
    if family == "sort":
        return " ".join("".join(sorted(rest[0][: i + 1])) for i in range(len(rest[0]))), "".join(sorted(rest[0]))
    table, asked = {pair[0]: pair for pair in rest[:-2]}, rest[-1]
    if family == "chase":
        walked = [table[asked[0]]]
        while len(walked) < int(asked[1]):
            walked.append(table[walked[-1][1]])
    else:
        walked = [table[key] for key in asked]
    return " ".join(walked), walked[-1][1] if family == "chase" else "".join(pair[1] for pair in walked)


def test_choice_is_large_enough_and_distinct(questions: list[dict[str, Any]]) -> None:
    assert len(questions) == CHOICE_PER_FAMILY * len(FAMILIES) >= 500
    assert len({row["prompt"] for row in questions}) == len(questions)


def test_choice_has_one_gold_and_it_is_right(questions: list[dict[str, Any]]) -> None:
    for row in questions:
        trace, answer = solve(row["prompt"])
        right = f"<think>{trace}</think>{answer}"
        assert len(set(row["choices"])) == len(row["choices"]) == CHOICES
        assert row["choices"].index(right) == row["gold"], row["prompt"]
        assert {len(option) for option in row["choices"]} == {len(right)}, "length must not give it away"


def test_gold_is_everywhere(questions: list[dict[str, Any]]) -> None:
    counts = Counter(row["gold"] for row in questions)
    assert set(counts) == set(range(CHOICES))
    assert max(counts.values()) < 1.3 * len(questions) / CHOICES


@pytest.mark.parametrize("prefix", [1, 7, 40, 500, 599])
def test_any_prefix_is_stratified(questions: list[dict[str, Any]], prefix: int) -> None:
    counts = Counter(dict.fromkeys(FAMILIES, 0))
    counts.update(row["family"] for row in questions[:prefix])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(row["prompt"].startswith(row["family"] + " ") for row in questions[:prefix])


def test_a_smaller_suite_is_a_prefix(questions: list[dict[str, Any]]) -> None:
    count = 20 * len(FAMILIES)
    assert [row["prompt"] for row in choice(20)] == [row["prompt"] for row in questions[:count]]


@pytest.mark.parametrize("family", FAMILIES)
def test_generative(family: str) -> None:
    rows = generative(family)
    assert len({row["prompt"] for row in rows}) == len(rows) == GENERATIVE_PER_FAMILY
    assert all(row["family"] == family and solve(row["prompt"])[1] == row["answer"] for row in rows)
    assert len({row["distance"] for row in rows}) > 2
    assert generative(family, 10) == rows[:10]


def test_only_held_out_questions_are_asked(questions: list[dict[str, Any]]) -> None:
    asked = [*questions, *(row for family in FAMILIES for row in generative(family))]
    assert all(is_held_out(row["prompt"]) for row in asked)


def test_recall_asks_for_one_key(questions: list[dict[str, Any]]) -> None:
    asked = [*generative("recall"), *(row for row in questions if row["family"] == "recall")]
    assert {len(row["prompt"].split(" ")[-1]) for row in asked} == {1}


def test_the_suites_stand(questions: list[dict[str, Any]]) -> None:
    assert checksum(questions) == CHOICE_SUM
    assert {family: checksum(generative(family)) for family in FAMILIES} == GENERATIVE_SUMS


def test_random_state_elsewhere_does_not_matter(questions: list[dict[str, Any]]) -> None:
    random.seed(99)
    assert choice() == questions


def test_solve_agrees_that_a_corruption_is_wrong() -> None:
    """The oracle of this file can tell right from wrong."""
    rng = random.Random(0)
    for make in FAMILIES.values():
        example: Example = make(rng)
        trace, answer = solve(example.prompt)
        assert example.completion == f"<think>{trace}</think>{answer}" != corrupt(example, rng)
