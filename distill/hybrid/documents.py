"""Where the texts of a batch begin and end, read from position ids and padding mask; what contradicts is refused.

B = batch, T = tokens at hand, S = tokens that a cache holds already
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Padding(NamedTuple):
    """What a padding mask says of the tokens at hand."""

    begun: bool  # every row has had its first token
    behind: bool  # a row ends in padding
    starts: Tensor  # bool [B, T]: the first token of a row
    order: Tensor  # [B, T]: the places of a row, padding first


def read_padding(mask: Tensor, length: int, held: int = 0) -> Padding | None:
    """Read a padding mask [B, S + T] (1 = token) for the last ``length`` tokens; None where nothing is padded.

    Padding may stand before a text and behind it. Between two tokens it may stand only where an earlier call ended
    with it, within the first ``held`` columns: states were kept from it then.

    Raises ValueError for any other padding within a text.
    """
    if bool(mask.all()):
        return None
    real = mask != 0
    count = real.cumsum(-1)
    begun = count > 0
    past = mask.shape[1] - length
    token, padded = real[:, past:], begun & ~real
    resumed = real[:, 1:] & padded[:, :-1]  # a token right after padding that stands behind an earlier token
    hole = resumed.clone()
    hole[:, : min(held, past)] = False
    if bool(hole.any()):
        row, column = hole.nonzero()[0].tolist()
        raise ValueError(
            f"attention_mask is no padding mask: row {row} has padding (0) right before token {column + 1}, within its "
            "text; a recurrent state cannot leave out a token: put padding before a text or behind it"
        )
    behind = padded[:, past:]
    if past and bool((behind & begun[:, past - 1 : past]).any()):
        raise ValueError(
            "attention_mask has padding behind the new tokens of a text that the cache began: a recurrent state would "
            "read it; give such rows by themselves, or pad the first call on the left"
        )
    return Padding(
        begun=bool(begun[:, -1].all()),
        behind=bool(behind.any()),
        starts=token & (count[:, past:] == 1),
        order=token.to(torch.int8).argsort(dim=-1, stable=True),
    )


def check_positions(position_ids: Tensor, mask: Tensor | None, length: int, past: bool) -> None:
    """Raise ValueError where the positions of one text go back: only packed rows may do that, without mask and cache.

    position_ids [B or 1, T]; mask [B, S + T] or None.
    """
    what = "with an attention_mask" if mask is not None else "with a cache"
    back = position_ids[:, 1:] <= position_ids[:, :-1]
    if mask is not None:
        token = mask[:, -length:] != 0
        back = back & token[:, 1:] & token[:, :-1]
    if bool(back.any()):
        row, column = back.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} restart at token {column + 1}, as those of packed documents do, but {what} "
            "attention does not keep documents apart: for packed rows leave out attention_mask and past_key_values; "
            "for one text let positions grow"
        )
    if past:
        restart = position_ids[:, 0] == 0
        if mask is not None:
            restart = restart & (mask[:, -length] != 0) & (mask[:, :-length] != 0).any(-1)
        if bool(restart.any()):
            raise ValueError(
                "position_ids begin at 0 while the cache holds earlier tokens of the same text: let them go on from "
                "there, or leave them out"
            )


def packed_starts(position_ids: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Bool [B, T]: the first tokens of the documents in packed rows; None where every row is one document.

    A document begins where positions do not go on by one, as for transformers' attention.
    """
    broken = position_ids.diff(dim=-1) != 1
    return functional.pad(broken, (1, 0), value=True).expand(shape) if bool(broken.any()) else None


def check_shapes(position_ids: Tensor | None, mask: Tensor | None, shape: tuple[int, int], past: int) -> None:
    """Raise ValueError for a mask that is not [B, S + T], or position ids that are not [B or 1, T]."""
    batch, length = shape
    if mask is not None and mask.shape != (batch, past + length):
        cached = f" ({past} of them in the cache)" if past else ""
        wanted = f"[{batch}, {past + length}], a column for each token{cached}"
        raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)}")
    if position_ids is not None and (
        position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length
    ):
        raise ValueError(f"position_ids must be [{batch}, {length}] or [1, {length}], got {list(position_ids.shape)}")
