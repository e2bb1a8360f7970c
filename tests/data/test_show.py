"""Rows as text: what is marked is what is learned, whatever the tokenizer; where documents begin; padding."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data.pack import IGNORE, Document, pack
from distill.data.show import COLOUR, PLAIN, mark, show_row
from distill.data.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


def document(prompt: str, completion: str) -> Document:
    head, tail = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    return Document(head + tail, [IGNORE] * len(head) + tail)


def test_a_row() -> None:
    (row,) = pack([document("add 1+1", "2<|end|>"), document("sort 21", "12")], 20, 0)
    assert show_row(row, TOKENIZER, PLAIN) == [
        "── document 1: 7 tokens, 2 learned",
        "add 1+1⟦2<|end|>⟧",
        "── document 2: 6 tokens, 2 learned",
        "sort 21⟦12⟧",
        "── padding: 7 tokens",
    ]
    assert show_row(row, TOKENIZER, COLOUR)[3] == "sort 21\x1b[1;32m12\x1b[0m"


def test_a_row_without_padding() -> None:
    (row,) = pack([document("1", "2")], 2, 0)
    assert show_row(row, TOKENIZER, PLAIN) == ["── document 1: 2 tokens, 1 learned", "1⟦2⟧"]


@given(st.lists(st.tuples(st.sampled_from("ab1 "), st.booleans()), max_size=20))
def test_the_marks_enclose_what_is_learned(tokens: list[tuple[str, bool]]) -> None:
    ids = [TOKENIZER.convert_tokens_to_ids(token) for token, _ in tokens]
    labels = [number if learned else IGNORE for number, (_, learned) in zip(ids, tokens, strict=True)]
    text = mark(ids, labels, TOKENIZER, PLAIN)
    assert "".join(re.findall("⟦(.*?)⟧", text)) == "".join(token for token, learned in tokens if learned)
    assert re.sub("[⟦⟧]", "", text) == "".join(token for token, _ in tokens)


def test_spaces_that_a_decoder_drops_at_the_beginning_are_kept() -> None:
    """SentencePiece: ``▁two`` alone decodes without its space."""
    pieces = {"▁one": 0, "▁two": 1, "▁": 2}
    core = Tokenizer(models.WordLevel(pieces, unk_token="▁"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "two"
    assert mark([0, 1, 0], [IGNORE, 1, IGNORE], tokenizer, PLAIN) == "one⟦ two⟧ one"


def test_data_cannot_command_the_terminal() -> None:
    core = Tokenizer(models.WordLevel({"\x1b[2J": 0}, unk_token="\x1b[2J"))
    assert "\x1b" not in mark([0], [IGNORE], PreTrainedTokenizerFast(tokenizer_object=core), PLAIN)
