"""The states that a mixer carries from one call to the next, in the layer of transformers' cache that is its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def carried(cache: Any, layer: int) -> tuple[Any, Any]:
    """The states of the convolution and of the scan after the tokens so far; None, None where there were none.

    What is written into them stays in the cache. Under autograd they are copies: backward needs what was there.
    """
    if cache is None or not cache.has_previous_state(layer):
        return None, None
    found = cache.layers[layer]
    conv_state, scan_state = found.conv_states[0], found.recurrent_states[0]
    return (conv_state.clone(), scan_state.clone()) if torch.is_grad_enabled() else (conv_state, scan_state)


def keep(cache: Any, layer: int, conv_state: Tensor, scan_state: Tensor) -> None:
    """Hand the states after the last token to the cache, if there is one."""
    if cache is not None:
        cache.update_conv_state(conv_state, layer)
        cache.update_recurrent_state(scan_state, layer)
