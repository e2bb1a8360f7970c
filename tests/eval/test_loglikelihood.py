"""Prepared requests: the figures of lm-eval itself, however the requests are batched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from lm_eval import evaluator

from distill.data.chat import encode
from distill.data.families import FAMILIES
from distill.data.prompts import Prompt
from distill.data.sample import render, trace
from distill.errors import UserError
from distill.likelihood import Requests
from eval.accuracy import load_tasks
from eval.lm import LM
from eval.loglikelihood import drawn, first, prepare, prepare_all
from eval.suites import task_manager

QUESTIONS = 40


@pytest.fixture(scope="module")
def requests(make_llama: Callable[..., Any], tokenizer: Any) -> Requests:
    return prepare("embedded_choice", tokenizer, make_llama(), QUESTIONS)


def choices(model: Any, requests: Requests) -> list[list[float]]:
    """Log-likelihood of every choice of every question, one at a time, in float64."""
    model = model.double()
    values: list[list[float]] = [[] for _ in requests.gold]
    for request in sorted(requests.requests, key=lambda r: (r.question, r.choice)):
        ids = torch.tensor([request.ids])
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
        each = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        values[request.question].append(float(each[0, -request.targets :].sum()))
    return values


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_accuracy_is_lm_evals(name: str, requests: Requests, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    from lm_eval import simple_evaluate

    model = request.getfixturevalue(name)
    results = simple_evaluate(
        model=LM(model, tokenizer, 16),
        tasks=["embedded_choice"],
        task_manager=task_manager(["embedded_choice"]),
        limit=QUESTIONS,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=True,
        verbosity="ERROR",
    )
    assert results is not None
    figures = requests.evaluate(model)
    assert figures["questions"] == results["n-samples"]["embedded_choice"]["effective"] == QUESTIONS
    assert figures["accuracy"] == results["results"]["embedded_choice"]["acc,none"]
    assert 0 < figures["accuracy"] < 1
    samples = sorted(results["samples"]["embedded_choice"], key=lambda sample: sample["doc_id"])
    assert requests.gold == tuple(sample["doc"]["gold"] for sample in samples)
    right = [sample["filtered_resps"][sample["doc"]["gold"]][0] for sample in samples]
    assert figures["loglikelihood"] == pytest.approx(sum(right) / QUESTIONS, rel=1e-5)


def test_figures_do_not_depend_on_the_batching(hybrid_family: Any, requests: Requests) -> None:
    hybrid = hybrid_family
    results = [requests.evaluate(hybrid, batch_tokens=tokens) for tokens in (1, 300, 8192, 10**6)]
    for result in results:
        assert result == pytest.approx(results[0], rel=1e-5)
    values = choices(hybrid, requests)
    right = [row[gold] for row, gold in zip(values, requests.gold, strict=True)]
    assert results[0]["loglikelihood"] == pytest.approx(sum(right) / QUESTIONS, rel=1e-5)
    best = [row.index(max(row)) == gold for row, gold in zip(values, requests.gold, strict=True)]
    accuracy = sum(best) / QUESTIONS
    assert results[0]["accuracy"] == accuracy
    assert results[0]["stderr"] == pytest.approx((accuracy * (1 - accuracy) / QUESTIONS) ** 0.5)


def test_requests_are_the_chat_and_its_completions(requests: Requests, tokenizer: Any) -> None:
    assert len(requests.requests) == 4 * QUESTIONS and len(requests.gold) == QUESTIONS
    request = requests.requests[0]
    text = tokenizer.decode(request.ids)
    context, completion = (
        tokenizer.decode(request.ids[: -request.targets]),
        tokenizer.decode(request.ids[-request.targets :]),
    )
    assert text.startswith("<|user|>") and context.endswith("<|assistant|>")
    assert completion.startswith("<think>") and "</think>" in completion
    assert sorted((r.question, r.choice) for r in requests.requests) == [
        (q, c) for q in range(QUESTIONS) for c in range(4)
    ]


def test_fewer_questions_are_the_first_ones(llama: Any, requests: Requests, tokenizer: Any) -> None:
    few = prepare("embedded_choice", tokenizer, llama, 5)
    assert few.gold == requests.gold[:5]
    assert few.requests == tuple(r for r in requests.requests if r.question < 5)


def test_a_generative_task_is_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="'embedded_add' is generate_until; importance scores need a multiple-choice"):
        prepare("embedded_add", tokenizer, llama)


@pytest.mark.parametrize("kind", ["byte_level", "prepend"])
@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "{{ strftime_now( '%d %b %Y' ) }}"])
def test_lm_eval_asks_in_the_tokens_that_training_has(
    kind: str, begin: str, llama: Any, make_tokenizer: Callable[[str], Any]
) -> None:
    """Whether or not the template writes the BOS that the tokenizer would add, and on whatever day."""
    tokenizer = copy.copy(make_tokenizer(kind))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", begin)
    tokenizer.pad_token = tokenizer.eos_token
    asked = [{"role": "user", "content": "add 1+1"}]
    (document,) = encode(tokenizer, [[*asked, {"role": "assistant", "content": "2"}]])
    lm = LM(llama, tokenizer, 1)
    text = lm.apply_chat_template(asked)
    assert lm.tok_encode(text) == document.ids[: document.completion]
    assert lm.tok_batch_encode([text])[0][0].tolist() == document.ids[: document.completion]
    (question,) = render(tokenizer, [Prompt(asked)])
    assert question.ids == document.ids[: document.completion]
    assert trace(tokenizer, question, "2") == {"messages": [*asked, {"role": "assistant", "content": "2"}]}


def test_questions_are_drawn_over_the_tasks_by_their_sizes() -> None:
    sizes = [100, 300, 7, 1000]
    taken = drawn(sizes, 141, "mmlu")
    assert [len(places) for places in taken] == [10, 30, 1, 100]
    assert all(places == sorted(set(places)) and places[-1] < size for places, size in zip(taken, sizes, strict=True))
    assert taken == drawn(sizes, 141, "mmlu") != drawn(sizes, 141, "arc")
    assert taken[3] != list(range(100)), "not the first ones"
    assert sum(map(len, drawn([10] * 57, 500, "mmlu"))) == 500
    assert [len(places) for places in drawn(sizes, 0, "mmlu")] == sizes
    assert first([3, 1, 2], 4) == [[0, 1], [0], [0]]


def test_mmlu_for_importance_scores_is_lm_evals(
    copies: Path, llama: Any, make_tokenizer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two examples before each question: the requests are among those that lm-eval makes, of each subject as many
    questions, and the same ones in every call."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    task, root, tokenizer = "mmlu_social_sciences", str(copies), make_tokenizer("byte_level")
    found = prepare(task, tokenizer, llama, 24, few_shot=2, local_data=root)
    assert found == prepare(task, tokenizer, llama, 24, few_shot=2, local_data=root)
    texts = [tokenizer.decode(request.ids) for request in found.requests]
    assert len(found.gold) == 24 and len(texts) == 4 * 24
    assert {text.count("Answer:") for text in texts} == {3}
    subjects = Counter(text.split(" about ")[1].split(".")[0] for text in texts)
    assert set(subjects.values()) == {4 * 2} and len(subjects) == 12

    class Asked(LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.seen = {tuple(chain(*self._encode_pair(*request.args))) for request in requests}
            return [(0.0, False)] * len(requests)

    lm = Asked(llama, tokenizer, 4)
    loaded = load_tasks(task, "multiple_choice", root, 2)
    evaluator.evaluate(lm=lm, task_dict=loaded, apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=0)
    assert {request.ids for request in found.requests} <= lm.seen
    assert len(lm.seen) > len({request.ids for request in found.requests})


def test_tasks_that_are_asked_together_share_the_questions(llama: Any, tokenizer: Any) -> None:
    """Each its own first ones; the figures are those of all of them."""
    names = [f"embedded_choice_{family}" for family in ("add", "recall", "sort")]
    every = prepare_all(names, tokenizer, llama, 8)
    parts = [prepare(name, tokenizer, llama, count) for name, count in zip(names, (2, 3, 3), strict=True)]
    assert every.gold == tuple(gold for part in parts for gold in part.gold)
    assert sorted({request.question for request in every.requests}) == list(range(8))
    found, single = every.evaluate(llama), [part.evaluate(llama) for part in parts]
    assert found["accuracy"] * 8 == pytest.approx(sum(each["accuracy"] * each["questions"] for each in single))
    likely = sum(each["loglikelihood"] * each["questions"] for each in single)
    assert found["loglikelihood"] * 8 == pytest.approx(likely, rel=1e-5)
    assert len(prepare_all(names, tokenizer, llama, 2).gold) == 2


def test_the_families_are_the_parts_of_the_suite(llama: Any, tokenizer: Any) -> None:
    families = [prepare(f"embedded_choice_{family}", tokenizer, llama) for family in FAMILIES]
    whole = prepare("embedded_choice", tokenizer, llama)
    assert {r.ids for part in families for r in part.requests} == {r.ids for r in whole.requests}
    assert sum(len(part.gold) for part in families) == len(whole.gold)
