"""Rows split into padded batches of documents: where tokens, states and gradients go, and what it costs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from distill.ops import split_rows
from distill.ops.split_rows import by_document, split


def random_starts(batch: int, length: int, density: float) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < density


LAYOUTS = [random_starts(*shape) for shape in ((1, 1, 0.0), (1, 1, 1.0), (3, 2, 0.5), (2, 63, 0.1), (4, 100, 0.7))]
LAYOUTS += [torch.zeros(2, 37, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)]
every_layout = pytest.mark.parametrize("reset", LAYOUTS, ids=lambda reset: f"{list(reset.shape)}-{int(reset.sum())}")


@every_layout
def test_tokens_come_back_and_so_do_their_gradients(reset: Tensor) -> None:
    tokens = torch.randn(*reset.shape, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = split(reset)
    batches = rows.documents(tokens)
    assert [batch.shape for batch in batches] == [(*size, 2, 3) for size in rows.sizes]
    back = rows.tokens(batches)
    assert torch.equal(back, tokens)
    weight = torch.randn_like(back)
    (gradient,) = torch.autograd.grad((back * weight).sum(), tokens)
    assert torch.equal(gradient, weight)


@every_layout
def test_the_cost_is_bounded(reset: Tensor) -> None:
    rows = split(reset)
    length = reset.shape[1]
    assert len(rows.sizes) <= length.bit_length() + 1
    assert reset.numel() <= sum(count * places for count, places in rows.sizes) < 2 * reset.numel()
    assert all(places <= length for _, places in rows.sizes)


def test_a_batch_holds_no_more_documents_than_a_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_rows, "MOST_ROWS", 4)
    reset = torch.ones(2, 5, dtype=torch.bool)
    tokens = torch.randn(2, 5, 3)
    assert split(reset).sizes == [(4, 1), (4, 1), (2, 1)]
    y, last = by_document(sums, [tokens], reset, torch.ones(2, 3))
    assert torch.equal(y, tokens) and torch.equal(last, tokens[:, -1])


def sums(tokens: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """A scan: running sums, of which padding changes nothing."""
    y = tokens.cumsum(1) if initial is None else initial[:, None] + tokens.cumsum(1)
    return y, y[:, -1].detach()


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@every_layout
def test_a_scan_by_document(reset: Tensor, state: bool) -> None:
    tokens = torch.randn(*reset.shape, 3, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(len(reset), 3, dtype=torch.float64, requires_grad=True) if state else None
    now, outputs = torch.zeros(len(reset), 3) if initial is None else initial, []
    for t in range(reset.shape[1]):
        now = torch.where(reset[:, t, None], 0, now) + tokens[:, t]
        outputs.append(now)
    want = torch.stack(outputs, 1)
    y, last = by_document(sums, [tokens], reset, initial)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, want[:, -1].detach())
    weight = torch.randn_like(want)
    leaves = [tokens] if initial is None else [tokens, initial]
    found, expected = (torch.autograd.grad((out * weight).sum(), leaves) for out in (y, want))
    torch.testing.assert_close(found, expected)


def test_padding_is_zeros_and_whatever_comes_of_it_is_dropped() -> None:
    tokens = torch.full((1, 8), float("nan"), requires_grad=True)
    reset = torch.tensor([[True, False, False, True, False, False, False, False]])  # 3 and 5 tokens: 1 and 3 of padding
    rows = split(reset)
    short, long = rows.documents(tokens)
    assert not short[:, 3:].any() and not long[:, 5:].any() and short.shape == (1, 4) and long.shape == (1, 8)
    poisoned = (short + torch.tensor([0, 0, 0, float("inf")]), long)
    (gradient,) = torch.autograd.grad((*poisoned,), tokens, (torch.full_like(short, float("nan")), torch.ones(1, 8)))
    assert gradient[0, :3].isnan().all() and torch.equal(gradient[0, 3:], torch.ones(5))
    assert rows.tokens(poisoned).isnan().all(), "what was there, without the inf of padding"


def test_rows_without_documents_are_left_alone() -> None:
    tokens, state = torch.randn(2, 5, 3), torch.randn(2, 3)
    seen = []

    def scan(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append(operands)
        return tokens, state

    y, last = by_document(scan, [tokens], None, state)
    assert y is tokens and last is state and seen[0][0] is tokens and seen[0][1] is state


def test_layers_that_are_given_the_same_starts_share_a_plan() -> None:
    reset = random_starts(2, 20, 0.3)
    plan = split(reset)
    assert split(reset) is plan
    assert split(reset.clone()) is not plan
    reset[0, 7] = not reset[0, 7]
    assert split(reset) is not plan, "the tensor says something else now"
    held = weakref.ref(reset), weakref.ref(split(reset))
    del reset
    gc.collect()
    assert held[0]() is held[1]() is None, "neither the starts nor their plan outlive the step"
    with torch.device("meta"):
        assert split(LAYOUTS[3].clone()).sizes == split(LAYOUTS[3]).sizes
    with torch.inference_mode():
        reset = random_starts(2, 20, 0.3)
        before = split(reset).sizes
        reset.fill_(True)
        assert split(reset).sizes == [(40, 1)] != before
