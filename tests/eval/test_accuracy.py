"""Accuracy through lm-eval: the embedded tasks load offline and score answers as they should."""

from __future__ import annotations

import re
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.model import LM

from distill.config import MeasureConfig
from distill.data import suite
from distill.data.families import FAMILIES
from distill.errors import UserError
from eval import lm as asking
from eval import suites
from eval.accuracy import evaluate
from eval.answers import Tally
from eval.scores import LINE, Scores, rows_by_distance, rows_of
from eval.suites import ALL, OURS, USUAL, task_manager

LIMIT = 8


class Stub(LM):
    """An lm-eval model that answers from the suites, through the tokenizer's chat template."""

    def __init__(self, tokenizer: Any, knows: Callable[[str], bool]) -> None:
        super().__init__()
        self.tokenizer, self.knows = tokenizer, knows
        self.answers = {q["prompt"]: q["answer"] for family in FAMILIES for q in suite.generative(family)}
        self.right = {q["prompt"]: q["choices"][q["gold"]] for q in suite.choice()}
        self.budgets: set[int] = set()
        self.tally, self.sample = Tally(), 0
        self.whole: set[str] = set()

    @property
    def tokenizer_name(self) -> str:
        return "stub"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests: list[Any]) -> list[str]:
        results = []
        for request in requests:
            context, options = request.args
            self.budgets.add(options["max_gen_toks"])
            prompt = question_of(context)
            results.append(f"<think>1 2 3</think>{self.answers[prompt] if self.knows(prompt) else 'x'}")
        return results

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        results = []
        for request in requests:
            context, continuation = request.args
            prompt = question_of(context)
            best = (continuation == self.right[prompt]) == self.knows(prompt)
            results.append((-1.0 if best else -2.0, False))
        return results

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise AssertionError("no task here asks for it")


def question_of(context: str) -> str:
    match = re.fullmatch(r"<\|user\|>(.*)<\|assistant\|>", context)
    assert match, context
    return match[1]


def of_task(scores: Scores, task: str) -> dict[int, tuple[float, int]]:
    """Distance -> accuracy and questions."""
    rows = [row for row in scores.by_distance if row["task"] == task]
    assert [row["distance"] for row in rows] == sorted({row["distance"] for row in rows})
    assert all(row["stderr"] == pytest.approx((row["value"] * (1 - row["value"]) / row["n"]) ** 0.5) for row in rows)
    return {row["distance"]: (row["value"], row["n"]) for row in rows}


@pytest.fixture
def score(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """``score(knows)``: rows by task of a model that is right where ``knows(prompt)``; the network is cut off."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("neither the network nor another program (git, pip) may be asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)

    def run(knows: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
        stub = Stub(tokenizer, knows)
        monkeypatch.setattr(asking, "LM", lambda *_: stub)
        scores = evaluate(None, tokenizer, MeasureConfig(batch_size=4, limit=LIMIT))
        assert stub.budgets == {96}
        return {row["task"]: {**row, "by_distance": of_task(scores, row["task"])} for row in scores.rows}

    return run


def test_right_answers_score_one(score: Callable[..., dict[str, dict[str, Any]]]) -> None:
    rows = score(lambda prompt: True)
    assert set(rows) == {*FAMILIES, "embedded_choice"}
    for task, row in rows.items():
        generative = task in FAMILIES
        assert row == {
            "task": task,
            "kind": "generative" if generative else "multiple_choice",
            "metric": "exact_match" if generative else "acc",
            "value": 1.0,
            "stderr": 0.0,
            "n": LIMIT,
            "cut": 0,
            **({"filter": "answer"} if generative else {}),
            "by_distance": {
                distance: (1.0, n)
                for distance, n in Counter(q["distance"] for q in suite.generative(task)[:LIMIT]).items()
            }
            if generative
            else {},
        }


def test_each_distance_is_scored_on_its_own_questions(score: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """A model that knows the questions at two distances, and of a third all but one."""
    questions = suite.generative("recall")[:LIMIT]
    numbers = Counter(q["distance"] for q in questions)
    (third, most), *others = sorted(numbers.items(), key=lambda pair: -pair[1])
    known = {others[0][0], others[1][0]}
    missed = next(q["prompt"] for q in questions if q["distance"] == third)
    right = {q["prompt"] for q in questions if q["distance"] in {*known, third} and q["prompt"] != missed}
    row = score(lambda prompt: prompt in right)["recall"]
    assert most > 1
    assert row["by_distance"] == {
        distance: (1.0 if distance in known else (n - 1) / n if distance == third else 0.0, n)
        for distance, n in numbers.items()
    }
    assert row["value"] == len(right) / LIMIT


def test_documents_without_a_distance_have_no_rows() -> None:
    """And of several filters only the one of the task's own figure counts."""
    samples = [
        {"doc_id": 0, "doc": {"distance": 2}, "filter": "strict", "exact_match": 1.0},
        {"doc_id": 0, "doc": {"distance": 2}, "filter": "loose", "exact_match": 0.0},
        {"doc_id": 1, "doc": {"distance": 1}, "filter": "strict", "exact_match": 0.0},
        {"doc_id": 2, "doc": {"distance": "far"}, "filter": "strict", "exact_match": 1.0},
        {"doc_id": 3, "doc": {}, "filter": "strict", "exact_match": 1.0},
    ]
    results = {
        "results": {"a": {"exact_match,strict": 0.5, "exact_match,loose": 0.0}, "b": {"acc,none": 1.0}},
        "samples": {"a": samples, "b": [{"doc_id": 0, "doc": {}, "filter": "none", "acc": 1.0}]},
    }
    rows = [(row["task"], row["distance"], row["value"], row["n"]) for row in rows_by_distance([results])]
    assert rows == [("a", 1, 0.0, 1), ("a", 2, 1.0, 1)]


def test_of_several_samples_the_standard_error_is_that_of_the_questions() -> None:
    """pass@1 is the mean over questions of the mean over their samples; those of one question are no new ones."""

    def results(*values: float) -> dict[str, Any]:
        samples = [{"doc_id": i, "doc": {}, "filter": "none", "exact_match": value} for i, value in enumerate(values)]
        return {"results": {"a": {"exact_match,none": 0.0}}, "samples": {"a": samples}}

    (row,) = rows_of([results(1, 0, 1, 0), results(1, 0, 0, 1)], "generative")
    assert (row["value"], row["n"], row["samples"]) == (0.5, 4, 2)
    assert row["stderr"] == pytest.approx((((0.5**2) * 2 / 4) / 4) ** 0.5)
    (same,) = rows_of([results(1, 0, 1, 0)] * 5, "generative")
    (once,) = rows_of([results(1, 0, 1, 0)], "generative")
    assert same["stderr"] == once["stderr"] == pytest.approx((0.25 / 4) ** 0.5) and "samples" not in once


def test_lines_join_neighbours_of_equal_accuracy() -> None:
    rows = [{"task": t, "metric": "exact_match", "value": 0.98, "stderr": 0.014} for t in ("chase", "recall", "gsm8k")]
    rows[2] |= {"truncated": 3, "empty": 0, "cut": 1}
    hops = {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.95, 5: 1.0}
    distances = [{"task": "chase", "distance": d, "value": value} for d, value in hops.items()]
    distances += [{"task": "recall", "distance": d, "value": d / 12} for d in range(12)]
    chase, recall, gsm8k = Scores(rows, distances).lines()
    assert chase == "  chase              exact_match  98.0% +- 1.4   by hops 1-3: 100  4: 95  5: 100"
    assert gsm8k == "  gsm8k              exact_match  98.0% +- 1.4   3 truncated, 1 prompts cut"
    first, second = recall.splitlines()
    assert first.endswith("+- 1.4") and second.strip().startswith("by pairs after it 0: 0  1: 8  2: 17")
    assert max(map(len, (chase, first, second))) <= LINE


def test_each_family_is_scored_on_its_own_questions(score: Callable[..., dict[str, dict[str, Any]]]) -> None:
    rows = score(lambda prompt: prompt.startswith(("add", "sort")))
    assert {task for task, row in rows.items() if row["value"] == 1} == {"add", "sort"}
    assert {task for task, row in rows.items() if row["value"] == 0} == {"mod", "chase", "recall"}
    families = [q["family"] for q in suite.choice()[:LIMIT]]
    known = sum(family in ("add", "sort") for family in families) / LIMIT
    assert rows["embedded_choice"]["value"] == known
    assert rows["embedded_choice"]["stderr"] == pytest.approx((known * (1 - known) / LIMIT) ** 0.5)


def test_a_real_model_is_scored(hybrid: Any, tokenizer: Any) -> None:
    scores = evaluate(hybrid, tokenizer, MeasureConfig(generative=["embedded_add"], batch_size=8, limit=LIMIT))
    assert [(row["task"], row["kind"], row["n"]) for row in scores.rows] == [
        ("add", "generative", LIMIT),
        ("embedded_choice", "multiple_choice", LIMIT),
    ]
    assert all(0 <= row["value"] <= 1 for row in scores.rows)
    assert sum(row["n"] for row in scores.by_distance) == LIMIT


def test_nothing_to_score_is_no_row(tokenizer: Any) -> None:
    assert evaluate(None, tokenizer, MeasureConfig(generative=[], multiple_choice=[])) == Scores([], [])


def test_unknown_task_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a few of lm-eval's tasks in place of its many thousand, which take long to read."""
    ours = suites._manager(OURS)
    usual = SimpleNamespace(all_tasks=[*ours.all_tasks, "gsm8k"])
    everything = SimpleNamespace(all_tasks=[*usual.all_tasks, "triviaqa"])
    monkeypatch.setattr(suites, "_manager", {OURS: ours, USUAL: usual, ALL: everything}.__getitem__)
    assert task_manager(["embedded_choice", "embedded_generative"]) is ours
    assert task_manager(["embedded_choice", "gsm8k"]) is usual
    assert task_manager(["gsm8k", "triviaqa"]) is everything
    for given, near in (("embedded_choise", "embedded_choice"), ("gsm8", "gsm8k"), ("math-500", "math500")):
        with pytest.raises(UserError, match=f"unknown task '{given}' .did you mean '{near}'"):
            task_manager(["embedded_choice", given])


@pytest.mark.slow
def test_unknown_task_among_all_of_lm_evals() -> None:
    assert {"gsm8k", "mmlu", "embedded_choice"} <= set(task_manager(["gsm8k"]).all_tasks)
    with pytest.raises(UserError, match="unknown task 'gsm8kk'.*did you mean 'gsm8k"):
        task_manager(["gsm8kk"])


def test_a_group_with_a_figure_of_its_own_stands_for_its_tasks() -> None:
    """As lm-eval gives MMLU: a group of groups, each with its accuracy, beside every subject."""
    sizes = {"maths": (3, 10), "physics": (10, 20), "music": (4, 5), "gsm8k": (7, 7)}
    values = {name: [1.0] * right + [0.0] * (n - right) for name, (right, n) in sizes.items()}
    metric = {name: "exact_match" if name == "gsm8k" else "acc" for name in sizes}
    results = {
        "group_subtasks": {"mmlu": ["stem", "arts"], "stem": ["maths", "physics"], "arts": ["music"], "gsm8k": []},
        "results": {
            "mmlu": {"acc,none": 0.5, "alias": "mmlu"},
            "stem": {"acc,none": 0.4},
            "arts": {"acc,none": 0.7},
            **{name: {f"{metric[name]},none": 0.5} for name in sizes},
            "heading": {"alias": "heading"},
        },
        "samples": {
            name: [{"doc_id": i, "doc": {}, "filter": "none", metric[name]: value} for i, value in enumerate(each)]
            for name, each in values.items()
        },
    }
    rows = {row["task"]: row for row in rows_of([results], "multiple_choice")}
    assert {task: (row["metric"], row["value"], row["n"]) for task, row in rows.items()} == {
        "mmlu": ("acc", pytest.approx(17 / 35), 35),
        "gsm8k": ("exact_match", 1.0, 7),
    }
    within = [10 * 0.3 * 0.7, 20 * 0.5 * 0.5, 5 * 0.8 * 0.2]
    assert rows["mmlu"]["stderr"] == pytest.approx(sum(within) ** 0.5 / 35), "of a sample stratified by task"
    even = rows_of([results], "multiple_choice", even={"mmlu"})[0]
    assert even["value"] == pytest.approx((0.3 + 0.5 + 0.8) / 3)
