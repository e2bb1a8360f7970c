"""Chats to packed rows: template, completion mask, and packing that keeps documents apart.

Legend: R = rows, T = sequence length. A packed row holds several documents; ``position_ids`` start at 0 in
each, which is how every mixer (attention masks and Mamba states alike) tells where one begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.data.boundary import continuation
from distill.errors import UserError

IGNORE = -100  # label of a token that is not a target
OPEN_ROWS = 32  # rows kept open by first-fit packing


@dataclass(frozen=True)
class Document:
    """One tokenised chat: ``ids[n]`` and ``completion``, the index of the first token to learn."""

    ids: list[int]
    completion: int


def encode(tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[dict[str, str]]], mask: str) -> list[Document]:
    """Render and tokenise chats; with ``mask="completion"`` only the last assistant turn is learned.

    Raises UserError where a chat does not end with the assistant, or where the template does not render
    the prompt as a prefix of the whole chat (then no mask could be right).
    """
    if chats and tokenizer.chat_template is None:
        raise UserError("the teacher's tokenizer has no chat template, which messages and the embedded traces need")
    for chat in chats:
        check_chat(chat)
    whole = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats]
    prompts = [tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in chats]
    for text, prompt in zip(whole, prompts, strict=True):
        if not text.startswith(prompt):
            raise UserError(f"the chat template does not render a prompt as a prefix of its chat: {prompt[:60]!r}")
    return encode_texts(tokenizer, prompts, whole, mask)


def check_messages(chat: Any) -> None:
    """Raise UserError unless ``chat`` is a list of mappings with a role and a content of text."""
    if not isinstance(chat, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in chat):
        raise UserError("messages must be a list of mappings with a role and a content")
    if not all(isinstance(m.get("content"), str) for m in chat):
        raise UserError("the content of every message must be text")


def check_chat(chat: Any) -> None:
    """Raise UserError unless ``chat`` is a list of role/content messages that ends with the assistant's."""
    check_messages(chat)
    if not chat or chat[-1]["role"] != "assistant":
        raise UserError("a chat must end with an assistant turn (the completion to learn)")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], wholes: Sequence[str], mask: str
) -> list[Document]:
    """Tokenise texts whose prompts are prefixes; the first completion token is where the prompt's ids end.

    Where a token would span prompt and completion, the two are tokenised apart, as generation sees them.
    """
    if not wholes:
        return []
    ids = tokenizer(list(wholes), add_special_tokens=False)["input_ids"]
    heads = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    documents: list[Document] = []
    for row, head, prompt, whole in zip(ids, heads, prompts, wholes, strict=True):
        if row[: len(head)] != head:
            row = head + continuation(tokenizer, whole[len(prompt) :])
        documents.append(Document(row, len(head) if mask == "completion" else 1))
    return documents


def pack(documents: Iterable[Document], length: int, pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """First-fit packing of whole documents into rows of ``length`` tokens.

    Yields ``input_ids``, ``labels``, ``position_ids``, each int64 [T]. Labels are not shifted (the model
    shifts); the first token of a document is never a target, nor is padding, which counts as a document
    of its own. A document longer than ``length`` is cut to it.
    """
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in documents:
        document = Document(document.ids[:length], document.completion)
        need = len(document.ids)
        place = next((i for i, room in enumerate(free) if room >= need), None)
        if place is None:
            if len(rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=free.__getitem__)
                yield _row(rows.pop(fullest), length, pad)
                free.pop(fullest)
            rows.append([])
            free.append(length)
            place = len(rows) - 1
        rows[place].append(document)
        free[place] -= need
    for row in rows:
        yield _row(row, length, pad)


def _row(documents: list[Document], length: int, pad: int) -> dict[str, torch.Tensor]:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        first = max(document.completion, 1)
        ids += document.ids
        labels += [IGNORE] * min(first, len(document.ids)) + document.ids[first:]
        positions += range(len(document.ids))
    rest = length - len(ids)
    return {
        "input_ids": torch.tensor(ids + [pad] * rest),
        "labels": torch.tensor(labels + [IGNORE] * rest),
        "position_ids": torch.tensor(positions + list(range(rest))),
    }


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows [T] into a batch [R, T]. No attention mask: the positions say where documents begin."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
