"""Sampling from a model: left padding, seeds, end tokens; rows that read as they were said; the sieve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.data.chat import encode, encode_examples
from distill.data.examples import parse_row
from distill.data.prompts import Prompt, embedded_prompts
from distill.data.sample import Completion, Question, Sampling, Sieve, end_tokens, render, sample, trace
from distill.data.tokenizer import build_tokenizer
from distill.errors import UserError

GREEDY = Sampling(temperature=0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12)
LAST_TURN_ONLY = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}|{% endfor %}"


def asked(text: str, answer: str | None = None) -> Prompt:
    return Prompt([{"role": "user", "content": text}], answer, plain=True)


@pytest.fixture
def ids(tokenizer: Any) -> list[list[int]]:
    """Prompts of different lengths."""
    return [question.ids for question in render(tokenizer, embedded_prompts(6, 0))]


def test_a_batch_says_what_each_prompt_alone_says(llama: Any, tokenizer: Any, ids: list[list[int]]) -> None:
    assert len({len(prompt) for prompt in ids}) > 2, "some are padded"
    together = sample(llama, tokenizer, ids, GREEDY, 0)
    assert together == [sample(llama, tokenizer, [prompt], GREEDY, 0)[0] for prompt in ids]
    assert len({completion.text for completion in together}) > 1


def test_greedy_is_the_likeliest_token_each_time(llama: Any, tokenizer: Any, ids: list[list[int]]) -> None:
    said: list[int] = []
    for _ in range(12):
        said.append(int(llama(input_ids=torch.tensor([ids[0] + said])).logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    ended = said[-1] == tokenizer.eos_token_id
    expected = Completion(tokenizer.decode(said[: len(said) - ended]), len(said) - ended, ended)
    assert sample(llama, tokenizer, ids[:1], GREEDY, 0) == [expected]


def test_seed_and_batch_decide(llama: Any, tokenizer: Any, ids: list[list[int]]) -> None:
    first = sample(llama, tokenizer, ids, WARM, 1)
    torch.manual_seed(99)
    assert sample(llama, tokenizer, ids, WARM, 1) == first
    assert sample(llama, tokenizer, ids, WARM, 2) != first
    assert sample(llama, tokenizer, ids, replace(WARM, seed=1), 1) != first


def test_the_models_own_defaults_are_not_used(llama: Any, tokenizer: Any, ids: list[list[int]]) -> None:
    plain = [sample(llama, tokenizer, ids, options, 0) for options in (GREEDY, WARM)]
    own = llama.generation_config
    own.update(do_sample=True, repetition_penalty=9.0, top_k=1, temperature=5.0, max_new_tokens=3, min_new_tokens=12)
    assert [sample(llama, tokenizer, ids, options, 0) for options in (GREEDY, WARM)] == plain
    assert llama.generation_config is own


def test_a_completion_ends_at_any_end_token(llama: Any, tokenizer: Any, ids: list[list[int]]) -> None:
    """With every token of the vocabulary an end, each ends at once; cut at the limit, none has ended."""
    llama.generation_config.eos_token_id = list(range(64))
    assert sample(llama, tokenizer, ids, WARM, 0) == [Completion("", 0, True)] * 6
    llama.generation_config.eos_token_id = llama.config.eos_token_id = None
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|never|>"])
    tokenizer.eos_token = "<|never|>"
    llama.lm_head.weight.data[tokenizer.eos_token_id] = 0
    cut = sample(llama, tokenizer, ids, replace(GREEDY, max_new_tokens=2), 0)
    assert [(c.tokens, c.ended) for c in cut] == [(2, False)] * 6
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        end_tokens(llama, tokenizer)


def test_rendering(tokenizer: Any) -> None:
    prompts = [asked("add 1+1"), Prompt([{"role": "user", "content": "mod 2 1"}], where="p.jsonl:2")]
    first, second = render(tokenizer, prompts)
    assert first.text == "<|user|>add 1+1<|assistant|>"
    assert tokenizer.decode(first.ids) == first.text
    assert second.source == 1
    bare = build_tokenizer()
    bare.chat_template = None
    assert render(bare, prompts[:1])[0].text == "add 1+1"
    with pytest.raises(UserError, match=r"p\.jsonl:2: .*no chat template"):
        render(bare, prompts)
    bare.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match=r"p\.jsonl:2: .*refuses it: no users here"):
        render(bare, prompts[1:])


@pytest.mark.parametrize("template", ["own", "last turn only", "none"])
def test_a_trace_trains_on_what_was_read_and_said(template: str) -> None:
    """The tokens of the row, as training encodes it, are those of the prompt and the completion."""
    tokenizer = build_tokenizer()
    if template != "own":
        tokenizer.chat_template = None if template == "none" else LAST_TURN_ONLY
    (question,) = render(tokenizer, [asked("add 1+1")])
    said = "<think>1+1=2</think>2"
    row = trace(tokenizer, question, said)
    assert list(row) == (["messages"] if template == "own" else ["prompt", "completion"])
    if "messages" in row:
        (document,) = encode(tokenizer, [row["messages"]], "completion")
    else:
        (document,) = encode_examples(tokenizer, [parse_row(row, {})], "completion")
    assert document.ids[: document.completion] == question.ids
    assert tokenizer.decode(document.ids[document.completion :]) == said + "<|end|>"


def test_the_sieve() -> None:
    sieve = Sieve(min_tokens=2, keep_wrong=False)
    known, unknown = (Question(i, asked(str(i), answer), "", []) for i, answer in enumerate(("5", None)))
    given = [
        (known, Completion("5", 2, True), (True, True)),
        (known, Completion("5", 2, True), (False, True)),
        (known, Completion("6", 2, True), (False, False)),
        (known, Completion("5", 1, True), (False, True)),
        (known, Completion("5", 9, False), (False, False)),
        (unknown, Completion("5", 2, True), (True, None)),
        (unknown, Completion("5", 2, True), (False, None)),
        (unknown, Completion("6", 2, True), (True, None)),
    ]
    assert [sieve.take(question, completion) for question, completion, _ in given] == [want for *_, want in given]
    assert sieve.rejected == {"duplicate": 2, "wrong answer": 1, "too short": 1, "truncated": 1}
    assert (sieve.kept, sieve.judged, sieve.right) == (3, 5, 3)
    assert Sieve(1, keep_wrong=True).take(known, Completion("6", 2, True)) == (True, False)
