"""The embedded tokenizer: round trips, ids, chat template, masks, and life as a Hugging Face folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import distill.data
from distill.data.chat import encode
from distill.data.families import DIGITS, FAMILIES, LETTERS
from distill.data.tokenizer import END, SYMBOLS, VOCAB_SIZE, WORDS, build_tokenizer

TOKENIZER = build_tokenizer()
Load = Callable[[Path], PreTrainedTokenizerBase]


def saved(folder: Path) -> PreTrainedTokenizerBase:
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def shipped(_: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(str(distill.data.__file__)).parent / "teacher")


def built(_: Path) -> PreTrainedTokenizerBase:
    return TOKENIZER


def examples(count: int = 100) -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    return [FAMILIES[family](rng).messages for family in FAMILIES for _ in range(count)]


def test_ids_are_below_the_vocabulary_size_and_stand() -> None:
    assert len(TOKENIZER) == 56
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(56))
    assert VOCAB_SIZE == 64
    assert (TOKENIZER.pad_token_id, TOKENIZER.unk_token_id, TOKENIZER.eos_token_id) == (0, 1, 4)
    assert TOKENIZER.bos_token_id is None


@given(st.lists(st.sampled_from([*WORDS, *DIGITS, *LETTERS, *SYMBOLS]), max_size=60))
def test_round_trip(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < VOCAB_SIZE for i in ids)
    assert TOKENIZER.unk_token_id not in ids


def test_one_token_a_word_and_a_character() -> None:
    assert TOKENIZER.tokenize("chase cd from a3") == ["chase", " ", "c", "d", " ", "from", " ", "a", "3"]
    assert TOKENIZER.tokenize("<think>1+2</think>3<|end|>") == ["<think>", "1", "+", "2", "</think>", "3", END]


def test_what_it_does_not_know_is_unknown() -> None:
    assert TOKENIZER("aé\nZ")["input_ids"][1:] == [TOKENIZER.unk_token_id] * 3


@pytest.mark.parametrize("load", [built, saved, shipped])
def test_every_family_is_known(load: Load, tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    for chat in examples():
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text == f"<|user|>{chat[0]['content']}<|assistant|>{chat[1]['content']}<|end|>"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert max(ids) < VOCAB_SIZE
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("load", [saved, shipped])
def test_a_folder_gives_the_same_tokenizer(load: Load, tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.special_tokens_map == TOKENIZER.special_tokens_map
    assert tokenizer.chat_template == TOKENIZER.chat_template
    for chat in examples(20):
        both = [t.apply_chat_template(chat, tokenize=True, return_dict=True) for t in (tokenizer, TOKENIZER)]
        assert both[0]["input_ids"] == both[1]["input_ids"]


def test_the_prompt_is_a_prefix_that_asks_for_an_answer() -> None:
    for chat in examples(5):
        prompt = TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert prompt == f"<|user|>{chat[0]['content']}<|assistant|>"
        assert str(TOKENIZER.apply_chat_template(chat, tokenize=False)).startswith(prompt)


@pytest.mark.parametrize("load", [built, saved, shipped])
def test_the_generation_mask_is_the_completion_mask(load: Load, tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    chats = examples(20)
    for chat, document in zip(chats, encode(tokenizer, chats, "completion"), strict=True):
        rendered = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert rendered["input_ids"] == document.ids
        assert rendered["assistant_masks"] == [int(i >= document.completion) for i in range(len(document.ids))]
        assert tokenizer.decode(document.ids[document.completion :]) == chat[1]["content"] + END


def test_reasoning_may_be_given_apart() -> None:
    apart = [
        {"role": "user", "content": "sort 21"},
        {"role": "assistant", "reasoning_content": "2 12", "content": "12"},
    ]
    whole = [apart[0], {"role": "assistant", "content": "<think>2 12</think>12"}]
    assert TOKENIZER.apply_chat_template(apart, tokenize=False) == TOKENIZER.apply_chat_template(whole, tokenize=False)


def test_padding_is_the_pad_token() -> None:
    batch = TOKENIZER(["12", "1"], padding=True)
    assert batch["input_ids"][1] == [TOKENIZER("1")["input_ids"][0], TOKENIZER.pad_token_id]
