"""Packed rows as text, with what is learned marked: by colour on a terminal, by brackets elsewhere."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch

from distill.data.pack import IGNORE
from distill.data.traces import pad_id

COLOUR, PLAIN = ("\x1b[1;32m", "\x1b[0m"), ("⟦", "⟧")
"""What stands before and after a part that is learned."""


def show_row(row: dict[str, torch.Tensor], tokenizer: Any, marks: tuple[str, str]) -> list[str]:
    """A packed row [T] as lines of text: a rule where a document starts, the text of each, the padding counted."""
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    starts = [*torch.nonzero(row["position_ids"] == 0)[:, 0].tolist(), len(ids)]
    lines = []
    for number, (a, b) in enumerate(pairwise(starts), 1):
        learned = sum(label != IGNORE for label in labels[a:b])
        if b == len(ids) and not learned and set(ids[a:b]) == {pad_id(tokenizer)}:
            lines.append(f"── padding: {b - a:,} tokens")
        else:
            lines.append(f"── document {number}: {b - a:,} tokens, {learned:,} learned")
            lines.append(mark(ids[a:b], labels[a:b], tokenizer, marks))
    return lines


def mark(ids: list[int], labels: list[int], tokenizer: Any, marks: tuple[str, str]) -> str:
    """The text of a document [n], each part that is learned between ``marks``."""
    parts, end, before = [], 0, ""
    for learned, run in groupby(label != IGNORE for label in labels):
        start, end = end, end + len(list(run))
        whole = _decode(tokenizer, ids[:end])
        # decoded after what stands before it, or SentencePiece would drop the space that a part begins with
        part = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[start:end])
        before = whole
        parts.append(f"{marks[0]}{part}{marks[1]}" if learned else part)
    return "".join(parts)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.replace("\x1b", "␛")  # data cannot command the terminal
