"""Every question's trace and answer, checked by evaluators that share no code with the generators."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from distill.data.families import DIGITS, FAMILIES, LETTERS, MAX_HOPS, MAX_PAIRS, Example, corrupt, draw, is_held_out
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import EmbeddedTraces

COUNT = 400


def sample(family: str, count: int = COUNT, seed: int = 7) -> list[Example]:
    rng = random.Random(seed)
    return [FAMILIES[family](rng) for _ in range(count)]


def test_what_the_assistant_says() -> None:
    example = Example("mod", "mod 7 3+5", "3+5=1", "1", 1)
    assert example.completion == "<think>3+5=1</think>1"
    assert example.messages == [
        {"role": "user", "content": "mod 7 3+5"},
        {"role": "assistant", "content": "<think>3+5=1</think>1"},
    ]


def test_add() -> None:
    for example in sample("add"):
        expression = re.fullmatch(r"add (\d+\+\d+)", example.prompt)
        assert expression, example
        assert int(example.answer) == sum(int(n) for n in expression[1].split("+"))
        # The trace alone gives the answer: each column's last digit, then the last carry.
        columns = [re.fullmatch(r"(\d)\+(\d)\+([01])=(\d+)", step) for step in example.trace.split(" ")]
        assert all(columns), example
        totals = [int(column[4]) for column in columns if column]
        assert [sum(int(column[i]) for i in (1, 2, 3)) for column in columns if column] == totals
        assert [int(column[3]) for column in columns if column] == [0, *(t // 10 for t in totals[:-1])]
        assert sum(t % 10 * 10**i for i, t in enumerate(totals)) + totals[-1] // 10 * 10 ** len(totals) == int(
            example.answer
        )
        a, b = expression[1].split("+")
        assert [column[1] + column[2] for column in columns if column] == [
            x + y for x, y in zip(reversed(a), reversed(b), strict=True)
        ]
        assert example.distance == len(columns) == len(a)


def test_mod() -> None:
    operations: Counter[str] = Counter()
    for example in sample("mod"):
        parts = re.fullmatch(r"mod ([5-9]) ([-+*()\d]+)", example.prompt)
        assert parts, example
        modulus = int(parts[1])
        assert eval(parts[2]) % modulus == int(example.answer)
        steps = [re.fullmatch(r"(\d)([-+*])(\d)=(\d)", step) for step in example.trace.split(" ")]
        for before, step in zip([None, *steps], steps, strict=False):
            assert step, example
            assert eval(step[0].split("=")[0]) % modulus == int(step[4])
            assert before is None or before[4] == step[1]
        # The steps are those of the expression: its operators and operands, in order.
        assert re.findall(r"[-+*]\d|^\(*\d", parts[2])[1:] == [step[2] + step[3] for step in steps if step]
        assert parts[2].lstrip("(")[0] == steps[0][1] if steps[0] else False
        assert steps[-1] and steps[-1][4] == example.answer
        assert example.distance == len(steps)
        operations.update(step[2] for step in steps if step)
    assert set(operations) == set("+-*")


def test_chase() -> None:
    for example in sample("chase"):
        parts = re.fullmatch(r"chase ((?:[a-z]{2} )+)from ([a-z])(\d)", example.prompt)
        assert parts, example
        edges = parts[1].split()
        follow = {edge[0]: edge for edge in edges}
        assert len(follow) == len(edges), "two edges leave one node"
        node, walked = parts[2], []
        for _ in range(int(parts[3])):
            walked.append(follow[node])
            node = follow[node][1]
        assert (example.trace, example.answer) == (" ".join(walked), node)
        assert node not in follow, "the chain ends where the hops do"
        assert example.distance == len(walked) <= MAX_HOPS


def test_recall() -> None:
    for example in sample("recall"):
        parts = re.fullmatch(r"recall ((?:[a-z]\d )+)from ([a-z]+)", example.prompt)
        assert parts, example
        listed = parts[1].split()
        value = {pair[0]: pair[1] for pair in listed}
        assert 2 <= len(value) == len(listed) <= MAX_PAIRS
        assert example.answer == "".join(value[key] for key in parts[2])
        assert example.trace == " ".join(key + value[key] for key in parts[2])
        assert example.distance == [pair[0] for pair in reversed(listed)].index(parts[2][0])


def test_sort() -> None:
    for example in sample("sort"):
        digits = example.prompt.removeprefix("sort ")
        prefixes = example.trace.split(" ")
        assert prefixes[0] == digits[0]
        for i, prefix in enumerate(prefixes):
            assert Counter(prefix) == Counter(digits[: i + 1])
            assert all(a <= b for a, b in pairwise(prefix))
        assert example.answer == prefixes[-1]
        assert example.distance == len(digits) == len(prefixes)


def test_families_are_named_by_their_key_and_by_their_prompt() -> None:
    for family in FAMILIES:
        for example in sample(family, 20):
            assert example.family == family == example.prompt.split(" ")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_fixes_the_data(family: str) -> None:
    assert sample(family, 50, seed=1) == sample(family, 50, seed=1)
    assert sample(family, 50, seed=1) != sample(family, 50, seed=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_distance_occurs(family: str) -> None:
    expected = {"add": (1, 4), "mod": (2, 5), "chase": (1, MAX_HOPS), "recall": (0, MAX_PAIRS - 1), "sort": (3, 6)}
    low, high = expected[family]
    assert {example.distance for example in sample(family, 2000)} == set(range(low, high + 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_draw_stays_on_its_side_of_the_split(family: str, held_out: bool) -> None:
    rng = random.Random(3)
    for _ in range(150):
        example = draw(family, rng, held_out=held_out)
        assert is_held_out(example.prompt) is held_out
        assert family != "recall" or not held_out or len(example.answer) == 1


def test_about_one_question_in_sixteen_is_held_out() -> None:
    prompts = {example.prompt for family in FAMILIES for example in sample(family, 2000)}
    assert 0.8 / 16 < sum(is_held_out(prompt) for prompt in prompts) / len(prompts) < 1.2 / 16


def test_the_split_is_the_same_on_every_machine() -> None:
    """Python's own hash is salted; this one must not be."""
    prompts = [f"add {a}+{b}" for a in range(10) for b in range(10)]
    assert [prompt for prompt in prompts if is_held_out(prompt)] == [
        f"add {terms}" for terms in ["1+1", "1+9", "3+8", "7+7", "7+9"]
    ]


def test_training_rows_hold_no_held_out_question() -> None:
    """Through tokenisation and packing: what is fed to the model, read back as text."""
    tokenizer = build_tokenizer()
    for held_out in (False, True):
        rows = EmbeddedTraces(tokenizer, 40, 256, dict.fromkeys(FAMILIES, 1.0), seed=5, held_out=held_out)
        text = "".join(tokenizer.decode(rows[i]["input_ids"]) for i in range(40))
        prompts = re.findall(r"<\|user\|>(.*?)<\|assistant\|>", text)
        assert len(prompts) > 200
        assert {is_held_out(prompt) for prompt in prompts} == {held_out}
        assert {prompt.split(" ")[0] for prompt in prompts} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_corrupted_completion_is_wrong_in_one_symbol_of_the_same_kind(family: str) -> None:
    rng = random.Random(11)
    answers = set()
    for example in sample(family):
        wrong = corrupt(example, rng)
        parts = re.fullmatch(r"<think>(.*)</think>(\w+)", wrong)
        assert parts, wrong
        assert wrong != example.completion
        assert len(parts[1]) == len(example.trace)
        changed = [(a, b) for a, b in zip(example.trace, parts[1], strict=True) if a != b]
        assert len(changed) == 1, wrong
        assert all(any(set(pair) <= set(kind) for kind in (DIGITS, LETTERS)) for pair in changed)
        assert len(parts[2]) == len(example.answer) or family == "recall"
        answers.add(parts[2] == example.answer)
    assert True in answers, "a wrong trace may still end in the right answer"
