"""An offline teacher: its top-k logits are written once, and a training reads them instead of running it.

Reverse KL asks the teacher for the probability of whatever the student finds likely, which k logits do not hold: it is
then an approximation (all beyond them is spread evenly over the rest), and so is every other loss that looks at the
teacher. ``measure_gap`` says by how much, on held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.pack import IGNORE, collate
from distill.head_loss import head_logits
from distill.losses import valid_targets
from distill.stored_logits import Shards, StoredRows, compress, key_of, write_shards
from distill.teacher import Teacher

CHUNK = 256  # targets whose logits are made at a time


class OfflineTeacher(Teacher):
    """Stands where a teacher does in a training; ``hidden`` gives what is stored in place of hidden states."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.shards, self.vocabulary = Shards(folder), vocabulary

    @property
    def head(self) -> Any:
        """There is none: the logits are stored."""
        return None

    def hidden(self, inputs: dict[str, Tensor]) -> Any:
        """What is stored of a batch of packed rows; UserError for a row that is not."""
        tokens, positions = inputs["input_ids"], inputs["position_ids"]
        rows = [self.shards[key_of(*row)] for row in zip(tokens, positions, strict=True)]
        return StoredRows(rows, self.vocabulary, tokens.device)


@torch.no_grad()
def write_logits(
    teacher: Teacher, rows: Any, folder: Path, *, k: int, batch_size: int, report: Callable[[int, int], None]
) -> None:
    """Write the teacher's top-k logits of the targets of packed rows (a sequence), a file a batch.

    ``report(done, all)`` is called with numbers of files. Interrupted, the same call goes on.
    """
    starts = range(0, len(rows), batch_size)

    def fill(start: int) -> list[dict[str, Any]]:
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        device = next(teacher.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
        labels = inputs.pop("labels")
        hidden = teacher.hidden(inputs)
        return [stored(row, h, label, teacher.head, k) for row, h, label in zip(batch, hidden, labels, strict=True)]

    write_shards(starts, folder, fill, lambda number: report(number + 1, len(starts)))


def stored(row: dict[str, Tensor], hidden: Tensor, labels: Tensor, head: Any, k: int) -> dict[str, Any]:
    """One row of data [T] as it is stored, from the teacher's hidden states [T, E]."""
    kept, _ = valid_targets(hidden[None], labels[None])
    with head_logits(kept, head) as logits:
        parts = [
            compress(logits(slice(at, at + CHUNK)), min(k, head.out_features)) for at in range(0, len(kept), CHUNK)
        ]
    nothing = [torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)]
    tokens, log_probs, rest = (torch.cat(part).cpu() for part in zip(*parts, strict=True)) if parts else nothing
    return {
        "row": key_of(row["input_ids"], row["position_ids"]),
        "positions": (row["labels"][1:] != IGNORE).nonzero().squeeze(1).numpy(),
        "tokens": tokens.flatten().numpy(),
        "log_probs": log_probs.flatten().half().numpy(),
        "rest": rest.numpy(),
    }
