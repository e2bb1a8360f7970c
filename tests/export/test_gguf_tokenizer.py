"""Which tokenizers a GGUF file holds, in which words; that llama.cpp reads them so is tested in test_gguf.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data.tokenizer import VOCAB_SIZE
from distill.errors import UserError
from distill.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, vocabulary


def held(core: Tokenizer, size: int = 300, **keys: Any) -> Vocabulary:
    return vocabulary(Path("model"), PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **keys), size)


def test_pre_tokenizers_go_by_the_names_that_llama_cpp_has(cores: Any) -> None:
    c = cores
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for core, name in (
        (c.byte_level(c.isolated(c.split), whole=True), "llama-bpe"),
        (c.byte_level(c.isolated(c.split)), "smaug-bpe"),
        (c.byte_level(c.isolated(c.split.replace("{1,3}", ""))), "qwen2"),
        (c.byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
        (c.byte_level(digits), "smollm"),
    ):
        found = held(core)
        assert (found.model, found.pre, found.merges) == ("gpt2", name, ["t h", "th e"])
        assert found.tokens[256:259] == ["th", "the", "</s>"] and found.kinds[255:259] == [NORMAL] * 3 + [CONTROL]
        assert len(found.tokens) == 300 and found.kinds[259:] == [UNUSED] * 41 and len(set(found.tokens)) == 300


def test_byte_fallback_goes_out_as_sentencepiece_with_its_merges_as_scores(cores: Any) -> None:
    found = held(cores.fallback(["ab", "▁ab", "abc"]), bos_token="<s>", unk_token="<unk>")
    assert (found.model, found.add_space_prefix, found.ids["bos"], found.ids["eos"]) == ("llama", True, 1, 2)
    assert found.kinds[0:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and found.kinds.count(BYTE) == 256
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["ab"] > score["▁ab"] > score["abc"] > score["c"] and not found.merges


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), "of the kind WordLevel"),
        (lambda c: Tokenizer(models.Unigram([("a", 0.0), ("</s>", 0.0)])), "of the kind Unigram"),
        (lambda c: c.byte_level(c.isolated(r"\p{Lu}+")), "llama.cpp does not know"),
        (lambda c: c.byte_level(c.isolated(c.split, r"\d")), "llama.cpp does not know"),
        (lambda c: c.byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (
            lambda c: c.fallback(["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("ab", "c")]),
            "does not merge 'a' and 'bc'",
        ),
    ],
    ids=["words", "unigram", "split", "two splits", "prefix space", "merges"],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(make: Any, message: str, cores: Any) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        held(make(cores))
    assert "held are" in str(error.value) and "hf-native" in str(error.value)


def test_a_normaliser_that_changes_letters_is_refused(cores: Any) -> None:
    c = cores
    core = c.byte_level(c.isolated(c.split))
    core.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="normaliser Lowercase"):
        held(core)
    core = c.fallback(["ab"])
    core.normalizer = normalizers.NFKC()
    with pytest.raises(UserError, match="with NFKC"):
        held(core)


def test_the_embedded_tokenizer_is_held(tokenizer: Any, tmp_path: Path) -> None:
    found = vocabulary(tmp_path, tokenizer, VOCAB_SIZE)
    assert len(found.tokens) == len(set(found.tokens)) == VOCAB_SIZE and found.chat_template == tokenizer.chat_template
    assert found.kinds[tokenizer.convert_tokens_to_ids("<think>")] == USER_DEFINED
    assert found.kinds[tokenizer.eos_token_id] == CONTROL and found.ids["eos"] == tokenizer.eos_token_id
    assert not found.add_bos and not found.add_eos and found.kinds[-1] == UNUSED
