"""A widened Llama computes what the given one does, and no channel of it is a copy of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.widen import widen
from distill.errors import UserError


def test_a_widened_model_computes_the_same(make_llama: Callable[..., Any]) -> None:
    model = make_llama(num_key_value_heads=2, num_attention_heads=4, hidden_size=64)
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are not all ones
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wide = widen(model)
    ids = torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids).logits, wide(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert wide.config.hidden_size == 128 and wide.config.num_key_value_heads == 4
    assert torch.unique(wide.model.layers[0].mlp.gate_proj.weight, dim=1).shape[1] == 128  # no column is a copy


def test_what_it_cannot_widen_is_refused(make_llama: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="a Llama without biases"):
        widen(make_llama(attention_bias=True))
