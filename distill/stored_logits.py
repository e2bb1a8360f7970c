"""Top-k logits of a teacher on disk: written once, a row of data at a time, and read back as whole distributions.

Legend: k = logits kept a target, n = targets of a row, V = vocabulary.

What is kept of a target's distribution: its k likeliest tokens, their log-probabilities in float16, and the log of the
probability of all others, float32, which is spread evenly over them when it is read. A row of data is known by the hash
of its tokens and positions. Files are Parquet with zstd, each written whole; ``shards.json`` has their checksums.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill.data.pack import IGNORE
from distill.errors import UserError
from distill.records import read_record, write_json
from distill.storage import checksums, damage, sync

INDEX = "shards.json"
SCHEMA = pa.schema(
    {
        "row": pa.binary(32),
        "positions": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),
        "log_probs": pa.list_(pa.float16()),
        "rest": pa.list_(pa.float32()),
    }
)


def key_of(tokens: Tensor, positions: Tensor) -> bytes:
    """The hash that a row of data [T] is known by."""
    both = (tensor.cpu().to(torch.int64).contiguous().numpy().tobytes() for tensor in (tokens, positions))
    return hashlib.sha256(b"".join(both)).digest()


def compress(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [n, V]: the k likeliest tokens [n, k], their log-probabilities, and the log of the rest's mass [n]."""
    log_p = torch.log_softmax(logits.float(), -1)
    top, tokens = log_p.topk(k, -1)
    rest = log_p.scatter(1, tokens, -math.inf).logsumexp(-1)
    return tokens, top, rest


def write_shards(
    batches: Sequence[Any], folder: Path, fill: Callable[[Any], list[dict[str, Any]]], done: Callable[[int], None]
) -> None:
    """Write a file for every batch, ``fill(batch)`` giving its rows; those that are there and whole are kept, so that a
    killed writing goes on and ends with the same bytes. ``done(number)`` is called after each."""
    index = folder / INDEX
    files = read_record(index, files=dict)["files"] if index.is_file() else {}
    for number, batch in enumerate(batches):
        name = f"{number:06d}.parquet"
        if name not in files or damage(folder, {name: files[name]}):
            target, partial = folder / name, folder / f".{name}.partial"
            pq.write_table(pa.Table.from_pylist(fill(batch), SCHEMA), partial, compression="zstd", use_dictionary=False)
            sync(partial)
            os.replace(partial, target)
            sync(folder)
            files[name] = checksums(folder, skip={path.name for path in folder.iterdir()} - {name})[name]
            write_json(index, {"files": files})
        done(number)


class StoredLogits:
    """The teacher's logits of n targets, put together chunk by chunk (``loss_chunks.TeacherLogits``)."""

    def __init__(self, tokens: Tensor, log_probs: Tensor, rest: Tensor, vocabulary: int) -> None:
        self.tokens, self.log_probs, self.vocabulary = tokens, log_probs, vocabulary
        others = vocabulary - tokens.shape[1]
        self.other = rest.unsqueeze(1) - math.log(others) if others else torch.zeros_like(rest.unsqueeze(1))

    def __call__(self, part: slice, columns: slice = slice(None), multiply: object = None) -> Tensor:
        """Log-probabilities of the targets ``part`` and a part of the vocabulary, [m, W]; nothing is multiplied."""
        first, last, _ = columns.indices(self.vocabulary)
        logits = self.other[part].expand(-1, last - first).contiguous()
        rows, at = ((self.tokens[part] >= first) & (self.tokens[part] < last)).nonzero(as_tuple=True)
        logits[rows, self.tokens[part][rows, at] - first] = self.log_probs[part][rows, at].to(logits.dtype)
        return logits


class StoredRows:
    """What is stored of a batch of rows: stands where a teacher's hidden states would."""

    def __init__(self, rows: Sequence[dict[str, Tensor]], vocabulary: int, device: torch.device) -> None:
        self.rows, self.vocabulary, self.device = rows, vocabulary, device

    def logits(self, labels: Tensor) -> StoredLogits:
        """The logits of the valid targets of labels [B, T] (not shifted), in their order.

        Raises UserError where a target was none when they were written.
        """
        parts: dict[str, list[Tensor]] = {"tokens": [], "log_probs": [], "rest": []}
        for row, label in zip(self.rows, labels.cpu(), strict=True):
            wanted = (label[1:] != IGNORE).nonzero().squeeze(1)
            at = torch.searchsorted(row["positions"], wanted)
            if len(wanted) and (at.max() >= len(row["positions"]) or not torch.equal(row["positions"][at], wanted)):
                raise UserError(
                    "the cached logits were written for other targets (data.mask): run 'distill cache' again"
                )
            for name, kept in parts.items():
                kept.append(row[name][at])
        tokens, log_probs, rest = (torch.cat(kept).to(self.device) for kept in parts.values())
        return StoredLogits(tokens.long(), log_probs.float(), rest, self.vocabulary)


class Shards:
    """The rows in a folder of shards and those below it, by their hash; the last few files read stay in memory.

    Raises UserError for a folder that holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place: dict[bytes, tuple[Path, int]] = {}
        for index in sorted(folder.rglob(INDEX)):
            for name in sorted(read_record(index, files=dict)["files"]):
                path = index.parent / name
                keys = pq.read_table(path, columns=["row"])["row"].to_pylist()
                self.place.update({key: (path, number) for number, key in enumerate(keys)})
        if not self.place:
            raise UserError(f"{folder} holds no cached logits: run 'distill cache'")
        self._table = functools.lru_cache(8)(pq.read_table)

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        """positions [n], tokens [n, k], log_probs [n, k], rest [n] of a row."""
        if key not in self.place:
            raise UserError(
                f"{self.folder} has no logits of a row of this training: it was written for other data, another seed "
                "or another sequence_length; run 'distill cache' again with --force"
            )
        path, number = self.place[key]
        row = self._table(path).slice(number, 1)
        values = {column: np.array(row[column].combine_chunks().flatten()) for column in SCHEMA.names[1:]}
        tensors = {column: torch.from_numpy(value) for column, value in values.items()}
        n = len(tensors["rest"])
        k = len(values["tokens"]) // max(n, 1)
        return tensors | {name: tensors[name].view(n, k) for name in ("tokens", "log_probs")}
