"""Where a completion begins: token ids of a text that goes on from another, as generation makes them.

SentencePiece-style tokenizers put a space before a text (U+2581, from a Metaspace pre-tokenizer or a Prepend
normaliser). A completion tokenised by itself would get one that its prompt and it do not have between them.
"""

from __future__ import annotations

from typing import Any

SPACE = "\u2581"
BEFORE = ("\n", "=", ".", "a")
"""Texts to tokenise a completion behind; one that merges with the completion is passed over."""


def continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` as it stands behind another text: without special tokens, and without a space that it has not."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    alone = ids(text)
    if not alone or not tokenizer.convert_ids_to_tokens(alone[0]).startswith(SPACE):
        return alone
    for before in BEFORE:
        head, whole = ids(before), ids(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return alone


def beyond(tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids of a vocabulary that the tokenizer does not know: padding of the embedding, never a token of any text."""
    return sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()))
