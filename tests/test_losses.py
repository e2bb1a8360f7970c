"""Losses: against plain autograd in float64, gradcheck, and the faults known elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax, softmax

from distill import head_loss
from distill.data.pack import IGNORE
from distill.errors import UserError
from distill.losses import LOSSES, distillation_loss

B, T, E, F, V = 3, 11, 8, 6, 23


def setup(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head, teacher = nn.Linear(E, V, dtype=dtype), nn.Linear(F, V, bias=False, dtype=dtype)
    hidden = torch.randn(B, T, E, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, T))
    labels[0, :5] = IGNORE
    labels[2] = IGNORE
    return hidden, head, torch.randn(B, T, F, dtype=dtype), teacher, labels


def plain(
    name: str, z: torch.Tensor, zt: torch.Tensor, labels: torch.Tensor, tau: float, progress: float = 1.0
) -> torch.Tensor:
    """The definition, over full logits, by autograd."""
    keep = labels[:, 1:] != IGNORE
    z, zt, y = z[:, :-1][keep] / tau, zt[:, :-1][keep] / tau, labels[:, 1:][keep]
    q, p, m = softmax(z, -1), softmax(zt, -1), (softmax(z, -1) + softmax(zt, -1)) / 2
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    per_token = {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "jsd": lambda: (kl(p, m) + kl(q, m)) / 2,
        "annealed_kl": lambda: (1 - progress) * kl(p, q) + progress * kl(q, p),
        "cross_entropy": lambda: -log_softmax(z, -1).gather(1, y[:, None])[:, 0],
    }[name]()
    return per_token.sum() / len(y)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 4, 10_000])
def test_equals_plain_autograd(name: str, tau: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", chunk * V * 8)
    hidden, head, other, teacher, labels = setup()
    expected = plain(name, head(hidden), teacher(other).detach(), labels, tau)
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    loss = distillation_loss(name, hidden, head, other, teacher, labels, temperature=tau)
    got = torch.autograd.grad(loss * 3, [hidden, head.weight, head.bias])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b * 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_annealed_goes_from_forward_to_reverse(progress: float) -> None:
    hidden, head, other, teacher, labels = setup()
    expected = plain("annealed_kl", head(hidden), teacher(other).detach(), labels, 1.0, progress)
    loss = distillation_loss("annealed_kl", hidden, head, other, teacher, labels, progress=progress)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (wanted,), (got,) = (torch.autograd.grad(each, hidden) for each in (expected, loss))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    hidden, head, other, teacher, labels = setup()
    assert torch.autograd.gradcheck(
        lambda h, w: distillation_loss(name, h, with_weight(head, w), other, teacher, labels, temperature=1.5),
        (hidden, head.weight.detach().clone().requires_grad_()),
    )


def with_weight(head: nn.Linear, weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight, module.bias = weight, head.bias.detach()
    return module


def test_student_equal_to_teacher_costs_nothing() -> None:
    hidden, head, *_, labels = setup()
    for name in ("reverse_kl", "forward_kl", "jsd"):
        loss = distillation_loss(name, hidden, head, hidden.detach(), head, labels)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert abs(loss.item()) < 1e-12
        assert gradient.abs().max() < 1e-12


def test_prompt_and_padding_do_not_count() -> None:
    """Only rows that predict a target matter, and the mean is over them: not over all tokens."""
    hidden, head, other, teacher, labels = setup()
    before = distillation_loss("reverse_kl", hidden, head, other, teacher, labels)
    with torch.no_grad():
        hidden[0, :4] += 100  # positions 0..3 predict the masked labels 1..4
        hidden[2] -= 50
    torch.testing.assert_close(distillation_loss("reverse_kl", hidden, head, other, teacher, labels), before)


def test_micro_batches_add_up_to_the_global_batch() -> None:
    """Unequal valid counts, one of them zero: with the global count the parts sum to the whole."""
    hidden, head, other, teacher, labels = setup()
    whole = distillation_loss("reverse_kl", hidden, head, other, teacher, labels)
    count = float((labels[:, 1:] != IGNORE).sum())
    parts = [
        distillation_loss(
            "reverse_kl", hidden[i : i + 1], head, other[i : i + 1], teacher, labels[i : i + 1], count=count
        )
        for i in range(B)
    ]
    assert parts[2].item() == 0.0
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_extreme_logits_stay_finite() -> None:
    hidden, head, other, teacher, labels = setup(torch.float32)
    loss = distillation_loss("reverse_kl", hidden * 1e4, head, other * -1e4, teacher, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [hidden, head.weight]))


def test_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'reverse_kl'"):
        distillation_loss("reverse_kll", *setup())
