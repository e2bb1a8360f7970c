"""Datasets of packed rows: the embedded traces (endless, by seed) and JSONL files of the user's own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distill.data.families import FAMILIES, draw
from distill.data.pack import Document, check_chat, encode, encode_texts, pack
from distill.errors import UserError, choose, nearest

Row = dict[str, torch.Tensor]
EMBEDDED = "embedded"
SHARD = 64  # rows generated together


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; it is never a target."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


class EmbeddedTraces(Dataset[Row]):
    """Packed rows of the five families; row i depends on (seed, i) alone, so any row can be had at any time.

    Args:
        rows: number of rows R.
        length: tokens a row T.
        mix: weight of each family (any positive numbers).
        held_out: draw from the held-out side of the split (for validation).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        length: int,
        mix: Mapping[str, float],
        seed: int,
        *,
        mask: str = "completion",
        held_out: bool = False,
    ) -> None:
        self.tokenizer, self.rows, self.length, self.seed = tokenizer, rows, length, seed
        self.mix, self.mask, self.held_out = dict(mix), mask, held_out
        self._shard: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        shard, place = divmod(index, SHARD)
        if self._shard[0] != shard:
            self._shard = (shard, self._generate(shard))
        return self._shard[1][place]

    def _generate(self, shard: int) -> list[Row]:
        rng = random.Random(f"{self.seed}/{shard}/{self.held_out}")
        return list(islice(pack(self._documents(rng), self.length, pad_id(self.tokenizer)), SHARD))

    def _documents(self, rng: random.Random) -> Any:
        families, weights = list(self.mix), list(self.mix.values())
        while True:
            names = rng.choices(families, weights, k=256)
            examples = [draw(name, rng, held_out=self.held_out) for name in names]
            yield from encode(self.tokenizer, [example.messages for example in examples], self.mask)


class FileTraces(Dataset[Row]):
    """Packed rows from a JSONL file of ``messages``, ``prompt``/``completion`` or ``text``.

    Rows are shuffled by seed, repeated when the file is shorter than what is asked for. With
    ``held_out`` the last ``1/16`` of the documents are taken, otherwise the rest.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        rows: int,
        length: int,
        seed: int,
        *,
        mask: str = "completion",
        held_out: bool = False,
    ) -> None:
        documents = read_documents(path, tokenizer, mask)
        if len(documents) < 2:
            raise UserError(f"{path}: at least 2 documents are needed (one is held out), found {len(documents)}")
        cut = len(documents) - max(1, len(documents) // 16)
        documents = documents[cut:] if held_out else documents[:cut]
        random.Random(seed).shuffle(documents)
        self.packed = list(islice(pack(documents, length, pad_id(tokenizer)), rows))
        if not any((row["labels"] != -100).any() for row in self.packed):
            raise UserError(f"{path}: no completion tokens within data.sequence_length={length}")
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return self.packed[index % len(self.packed)]


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase, mask: str) -> list[Document]:
    """Read and tokenise a JSONL file; a malformed row is named with its file and line."""
    chats: list[list[dict[str, str]]] = []
    prompts: list[str] = []
    wholes: list[str] = []
    end = tokenizer.eos_token or ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "messages" in row:
                check_chat(row["messages"])
                chats.append(row["messages"])
                continue
            prompt, completion = _prompt_and_completion(row)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        prompts.append(prompt)
        wholes.append(prompt + completion + end)
    return encode(tokenizer, chats, mask) + encode_texts(tokenizer, prompts, wholes, mask)


def _prompt_and_completion(row: Any) -> tuple[str, str]:
    """The texts of a row without messages; UserError where it has none."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be a mapping, not {type(row).__name__}")
    for names in (("prompt", "completion"), ("text",)):
        if set(names) <= row.keys():
            values = [row[name] for name in names]
            if not all(isinstance(value, str) for value in values):
                raise UserError(f"{' and '.join(names)} must be text")
            return ("", values[0]) if len(values) == 1 else (values[0], values[1])
    hint = nearest(next(iter(row)), ("messages", "text")) if len(row) == 1 else ""
    raise UserError(f"needs messages, prompt and completion, or text; has {', '.join(row) or 'nothing'}{hint}")


def load_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    mix: Mapping[str, float],
    seed: int,
    *,
    mask: str = "completion",
    held_out: bool = False,
) -> Dataset[Row]:
    """The dataset that ``data.source`` names: ``embedded``, or a path to a JSONL file."""
    check_source(source, mix)
    if source == EMBEDDED:
        return EmbeddedTraces(tokenizer, rows, length, mix, seed, mask=mask, held_out=held_out)
    return FileTraces(tokenizer, Path(source).expanduser(), rows, length, seed, mask=mask, held_out=held_out)


def check_source(source: str, mix: Mapping[str, float], key: str = "data.source") -> None:
    """Raise UserError where a source (the config's ``key``) does not exist, or the embedded families' mix is wrong."""
    if source != EMBEDDED:
        if not Path(source).expanduser().is_file():
            raise UserError(f"{key}: no such file: {source} (give '{EMBEDDED}' or a JSONL file)")
        return
    for family in mix:
        choose("family in data.mix", family, FAMILIES)
    if not mix or sum(mix.values()) <= 0 or min(mix.values()) < 0:
        raise UserError(f"data.mix needs positive weights, got {dict(mix)}")
