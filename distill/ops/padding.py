"""Keeping padding behind a text out of a recurrent state: the mixer sees it before the text instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def padding_first(forward: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Decorate a mixer's forward, so that it obeys ``order`` [B, T]: the places of a row in the order to read them in.

    With padding first the state after the last token read is that of the text; outputs go back to where their tokens
    were. Without ``order`` nothing is moved.
    """

    @functools.wraps(forward)
    def ordered(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        document_starts: Tensor | None = None,
        order: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if order is None:
            return forward(self, hidden_states, past_key_values, document_starts, **kwargs)
        places = order.unsqueeze(-1).expand_as(hidden_states)
        starts = None if document_starts is None else document_starts.gather(1, order)
        mixed, _ = forward(self, hidden_states.gather(1, places), past_key_values, starts, **kwargs)
        return mixed.gather(1, places.argsort(dim=1)), None

    return ordered
