"""Chats and texts to documents: what is learned under every kind of template, begin and end tokens, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from distill.data.chat import Rendered, encode, tokenise
from distill.data.pack import Document
from distill.data.tokenizer import build_tokenizer
from distill.errors import UserError

CHAT = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "<think>2 12</think>12"}]


def encode_texts(tokenizer: Any, prompts: list[str], wholes: list[str], mask: str) -> list[Document]:
    """Texts whose prompts are prefixes, as they are."""
    texts = [Rendered(whole, [(len(prompt), len(whole))]) for prompt, whole in zip(prompts, wholes, strict=True)]
    return tokenise(tokenizer, texts, mask)


def test_encode_learns_the_completion_or_everything() -> None:
    tokenizer = build_tokenizer()
    (document,) = encode(tokenizer, [CHAT], "completion")
    assert tokenizer.decode(document.ids[: document.completion]) == "<|user|>sort 21<|assistant|>"
    assert tokenizer.decode(document.ids[document.completion :]) == "<think>2 12</think>12<|end|>"
    (everything,) = encode(tokenizer, [CHAT], "all")
    assert (everything.ids, everything.completion) == (document.ids, 1)


def test_encode_learns_only_the_last_turn() -> None:
    tokenizer = build_tokenizer()
    (document,) = encode(tokenizer, [[*CHAT, {"role": "user", "content": "sort 3"}, CHAT[1]]], "completion")
    assert tokenizer.decode(document.ids[: document.completion]).endswith("12<|end|><|user|>sort 3<|assistant|>")


@pytest.mark.parametrize("chat", [[], CHAT[:1], [CHAT[1], CHAT[0]]])
def test_a_chat_without_a_last_word_is_refused(chat: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match="must end with an assistant turn"):
        encode(build_tokenizer(), [CHAT, chat], "completion")


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not render a prompt as a prefix"):
        encode(tokenizer, [CHAT], "completion")


def test_encode_texts() -> None:
    tokenizer = build_tokenizer()
    first, second = encode_texts(tokenizer, ["sort 21", ""], ["sort 2112", "add"], "completion")
    assert (tokenizer.decode(first.ids), first.completion) == ("sort 2112", 4)
    assert (tokenizer.decode(second.ids), second.completion) == ("add", 0)


def test_a_token_that_spans_prompt_and_completion_is_not_made() -> None:
    """``from a`` + ``dd 1`` would tokenise as one ``add`` before a space: then nothing of it could be learned."""
    tokenizer = build_tokenizer()
    (document,) = encode_texts(tokenizer, ["from a"], ["from add 1"], "completion")
    apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("from a", "dd 1")]
    assert document.ids == apart[0] + apart[1]
    assert document.completion == len(apart[0])
    assert tokenizer("from add 1", add_special_tokens=False)["input_ids"] != document.ids
