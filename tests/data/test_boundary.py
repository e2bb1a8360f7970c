"""Prompts and completions meet without a token or a space too many, whatever the tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.data.boundary import beyond, continuation
from distill.data.chat import Rendered, encode, tokenise
from distill.data.pack import Document
from distill.data.sample import Sampling, sample

KINDS = ("byte_level", "metaspace", "prepend", "unigram")
MakeTokenizer = Callable[[str], Any]


def tokenised(tokenizer: Any, prompt: str, completion: str) -> Document:
    end = len(prompt + completion)
    (document,) = tokenise(tokenizer, [Rendered(prompt + completion, [(len(prompt), end)])], "completion")
    return document


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_goes_on_where_its_prompt_ends(make_tokenizer: MakeTokenizer, kind: str) -> None:
    """Cut anywhere, also within a word: the ids of both parts are the whole text, and the prompt's are its own."""
    tokenizer, rng = make_tokenizer(kind), random.Random(0)
    text = "sort 3 1 2 from add 12+ 34 = mod  recall a1 b2\nchase x y z add 1"
    if kind == "unigram":
        text = text.replace("\n", " ")  # it has no piece for it, and no bytes
    apart = 0
    for _ in range(200):
        start, cut, end = sorted(rng.sample(range(len(text) + 1), 3))
        prompt, completion = text[start:cut], text[cut:end]
        document = tokenised(tokenizer, prompt, completion)
        head, rest = document.ids[: document.completion], document.ids[document.completion :]
        assert head == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert rest, "something is learned"
        # behind a letter, so that decoding drops no space at the begin of either
        before = tokenizer("a" + prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*before, *rest]) == "a" + prompt + completion
        apart += tokenizer(prompt + completion, add_special_tokens=False)["input_ids"] != document.ids
    assert apart > 10, "cut within a token: the test shows something"


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_by_hand(make_tokenizer: MakeTokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    first = {text: tokenizer.convert_ids_to_tokens(continuation(tokenizer, text)[0]) for text in ("add", " add", "3")}
    mark = "\u0120" if kind == "byte_level" else "\u2581"
    assert not first["add"].startswith(mark) and first[" add"].startswith(mark) and not first["3"].startswith(mark)
    assert continuation(tokenizer, "") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_begins_with_one_bos_and_learns_the_answer(make_tokenizer: MakeTokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    chat = [{"role": "user", "content": "add 1+2"}, {"role": "assistant", "content": "3"}]
    (document,) = encode(tokenizer, [chat], "completion")
    assert document.ids.count(tokenizer.bos_token_id) == 1 and document.ids[0] == tokenizer.bos_token_id
    learned = document.ids[document.completion :]
    assert tokenizer.convert_ids_to_tokens(learned)[:2] == ["3", "</s>"]
    generated = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert document.ids[: document.completion] == generated, "what generation reads"


def test_padding_of_the_vocabulary_is_never_drawn(
    make_model: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained logits of padded ids are anything; made likely here, they would be all that is drawn."""
    model = make_model("qwen2", vocab_size=72, tie_word_embeddings=False)
    padded = beyond(tokenizer, 72)
    assert padded == list(range(len(tokenizer), 72))
    assert beyond(tokenizer, len(tokenizer)) == []
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        model.lm_head.weight[padded] = hidden
        assert int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax()) in padded
    outputs, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: outputs.append(generate(*a, **k)) or outputs[-1])
    for temperature in (0.0, 1.0):
        sample(model, tokenizer, [[5, 6, 7]] * 8, Sampling(temperature=temperature, max_new_tokens=6), 0)
    assert len(outputs) == 2
    assert not torch.isin(torch.cat([output[:, 3:].flatten() for output in outputs]), torch.tensor(padded)).any()
