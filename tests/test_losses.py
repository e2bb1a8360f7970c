"""Losses: against plain autograd in float64, gradcheck, and the faults known elsewhere."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax, softmax

from distill import loss_chunks
from distill.data.pack import IGNORE
from distill.errors import UserError
from distill.losses import LOSSES, build_loss, distillation_loss, needs_teacher, terms_of
from distill.ops import linear_cpu

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
    monkeypatch.setattr(loss_chunks, "CHUNK_BYTES", chunk * V * 8)
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
    module.weight, module.bias = weight, None if head.bias is None else head.bias.detach()
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


MIXTURE = "0.6 reverse_kl + 0.3 forward_kl + 0.1 cross_entropy"


def terms(name: str, log_q: torch.Tensor, log_p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A mixture by its definition, per token, from tempered log-probabilities."""
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))
    each = {
        "reverse_kl": kl(log_q, log_p),
        "forward_kl": kl(log_p, log_q),
        "jsd": (kl(log_p, m) + kl(log_q, m)) / 2,
        "cross_entropy": -log_q.gather(1, y[:, None])[:, 0],
    }
    return sum(weight * each[term] for term, weight in terms_of(name).items())


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "cross_entropy", MIXTURE, "0.5 jsd + 2 cross_entropy"])
@pytest.mark.parametrize(("chunk", "slices"), [(8, 3), (10_000, 1), (5, 7)])
def test_float32_gradients_are_exact(
    name: str, tau: float, chunk: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the compiled kernel wherever it knows the terms, in chunks of tokens and slices of the vocabulary: within
    1e-6 of autograd in float64, and no further from it than plain autograd in float32."""
    vocabulary, width = 4099, 64
    monkeypatch.setattr(loss_chunks, "SLICE_BYTES", math.ceil(chunk * vocabulary * 4 / slices))
    monkeypatch.setattr(loss_chunks, "CHUNK_BYTES", chunk * vocabulary * 4)
    monkeypatch.setattr(loss_chunks, "tokens_of_chunk", lambda vocabulary, tokens: min(tokens, chunk))
    torch.manual_seed(0)
    head, teacher = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden, other = torch.randn(B, T, width, requires_grad=True), torch.randn(B, T, width)
    labels = torch.randint(0, vocabulary, (B, T))
    labels[0, :5] = labels[2] = IGNORE
    loss = distillation_loss(name, hidden, head, other, teacher, labels, temperature=tau, count=40.0)
    got = torch.autograd.grad(loss * 3, [hidden, head.weight, head.bias])
    wanted, plain_ones = (
        full_logits(name, hidden.to(dtype), head, other.to(dtype), teacher, labels, tau, 40.0 / 3)
        for dtype in (torch.float64, torch.float32)
    )
    assert loss.item() * 3 == pytest.approx(wanted[0], rel=1e-5)
    for own, exact, rounded in zip(got, wanted[1], plain_ones[1], strict=True):
        far, plain_far = (((one - exact).norm() / exact.norm()).item() for one in (own, rounded))
        assert far < max(1e-6, plain_far), f"plain autograd is at {plain_far:.1e}"


def full_logits(
    name: str,
    h: torch.Tensor,
    head: nn.Module,
    ht: torch.Tensor,
    teacher: nn.Module,
    y: torch.Tensor,
    tau: float,
    n: float,
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """The loss over full logits / n in the type of h, and by autograd its gradient of h, weight and bias."""
    head, teacher = (copy.deepcopy(module).to(h.dtype) for module in (head, teacher))
    h, keep = h.detach().requires_grad_(), y[:, 1:] != IGNORE
    log_q = log_softmax(head(h)[:, :-1][keep] / tau, -1)
    log_p = log_softmax(teacher(ht)[:, :-1][keep] / tau, -1)
    loss = terms(name, log_q, log_p, y[:, 1:][keep]).sum() / n
    return loss.item(), torch.autograd.grad(loss, [h, head.weight, head.bias])


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_compiled_kernel_anneals_as_plain_pytorch_does(progress: float, monkeypatch: pytest.MonkeyPatch) -> None:
    head, teacher = (nn.Linear(64, 4099) for _ in range(2))
    hidden, other = torch.randn(B, T, 64, requires_grad=True), torch.randn(B, T, 64)
    labels, found = torch.randint(0, 4099, (B, T)), []
    for compiled in (True, False):
        monkeypatch.setattr(loss_chunks, "has_numba", lambda compiled=compiled: compiled)
        loss = distillation_loss("annealed_kl", hidden, head, other, teacher, labels, progress=progress)
        found.append([loss, *torch.autograd.grad(loss, [hidden, head.weight])])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-7)


def test_the_compiled_kernel_is_what_large_vocabularies_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not asked for what it does not know, nor where autocast would change the products."""
    rows, weight = torch.zeros(2, E), torch.zeros(loss_chunks.COMPILED_VOCABULARY, E)
    serves = lambda name, *tensors: loss_chunks.compiled_serves(build_loss(name), *tensors)  # noqa: E731
    assert serves(MIXTURE, rows, weight) and serves("annealed_kl", rows, weight)
    assert not serves("jsd", rows, weight) and not serves("reverse_kl", rows, weight[:-1])
    assert not serves("reverse_kl", rows.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves("reverse_kl", rows, weight)
    monkeypatch.setattr(loss_chunks, "has_numba", lambda: False)
    assert not serves("reverse_kl", rows, weight)


@pytest.mark.parametrize("vocabulary", [23, 4099])
def test_tied_embeddings_get_both_gradients(vocabulary: int) -> None:
    """The head's weight is the embedding's: what comes of the loss is added to what comes through the states."""
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, 64, dtype=torch.float64) / 8).requires_grad_()
    teacher, ids = nn.Linear(64, vocabulary, bias=False, dtype=torch.float64), torch.randint(0, vocabulary, (2, 6))
    gradients = []
    for dtype in (torch.float64, torch.float32):
        tied, own = weight.detach().to(dtype).requires_grad_(), copy.deepcopy(teacher).to(dtype).requires_grad_(False)
        hidden = torch.tanh(nn.functional.embedding(ids, tied))
        if dtype == torch.float32:
            loss = distillation_loss("reverse_kl", hidden, with_weight(own, tied), hidden.detach(), own, ids)
        else:
            loss = plain("reverse_kl", hidden @ tied.T, own(hidden.detach()), ids, 1.0)
        gradients.append(torch.autograd.grad(loss, tied)[0])
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 1e-6


@pytest.mark.parametrize("vocabulary", [23, 4099])
def test_a_frozen_head_gets_no_gradient(vocabulary: int) -> None:
    head, teacher = (nn.Linear(E, vocabulary, bias=False).requires_grad_(False) for _ in range(2))
    hidden = torch.randn(2, 5, E, requires_grad=True)
    distillation_loss("reverse_kl", hidden, head, hidden.detach(), teacher, torch.ones(2, 5, dtype=int)).backward()
    assert hidden.grad is not None and head.weight.grad is None
    with torch.no_grad():  # as it is evaluated: nothing wants a gradient
        assert distillation_loss(MIXTURE, hidden, head, hidden, teacher, torch.ones(2, 5, dtype=int)) > 0


@pytest.mark.parametrize("vocabulary", [23, 4099])
def test_nan_comes_out(vocabulary: int) -> None:
    head, teacher = (nn.Linear(E, vocabulary, bias=False) for _ in range(2))
    hidden = torch.randn(1, 5, E)
    hidden[0, 2, 0] = torch.nan
    labels = torch.ones(1, 5, dtype=torch.int64)
    assert torch.isnan(distillation_loss("reverse_kl", hidden, head, torch.randn(1, 5, E), teacher, labels))


def test_chunks_on_cuda_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the device and the compiler: the same numbers, from what was compiled."""
    calls = []

    def compile(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": True}
        return lambda *inputs: calls.append(function) or function(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(loss_chunks, "has_triton", lambda: True)
    monkeypatch.setattr(loss_chunks, "on_cuda", lambda rows: True)
    loss_chunks.fused_divergence.cache_clear()
    found = distillation_loss("reverse_kl", *setup())
    assert calls == [loss_chunks.plain_divergence]
    loss_chunks.fused_divergence.cache_clear()
    monkeypatch.undo()
    torch.testing.assert_close(found, distillation_loss("reverse_kl", *setup()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.9 reverse_kll + 0.1 jsd", "did you mean 'reverse_kl'"),
        ("0.9reverse_kl", "write 'reverse_kl', or terms with weights"),
        ("", "cannot be read"),
        ("jsd + jsd", "has jsd twice"),
        ("0 jsd", "must be a number above 0"),
        ("1e999 jsd", "must be a number above 0"),
        ("1..2 jsd", "must be a number above 0"),
        ("-1 jsd", "cannot be read"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        terms_of(text, "train.loss")


def test_a_mixture_is_read_as_it_is_written() -> None:
    assert terms_of("0.9 reverse_kl + 0.1 cross_entropy") == {"reverse_kl": 0.9, "cross_entropy": 0.1}
    assert terms_of("2*jsd+.5*forward_kl") == {"jsd": 2.0, "forward_kl": 0.5}
    assert not needs_teacher("cross_entropy") and needs_teacher(MIXTURE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*LOSSES, MIXTURE])
def test_cuda_gives_what_the_cpu_does(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        hidden, head, other, teacher, labels = setup(torch.float32)
        hidden = hidden.detach().to(device).requires_grad_()
        head, teacher = head.to(device), teacher.to(device)
        loss = distillation_loss(name, hidden, head, other.to(device), teacher, labels.to(device))
        found.append([each.cpu() for each in (loss, *torch.autograd.grad(loss, [hidden, head.weight, head.bias]))])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_a_head_are_linear(has_onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever library, also of a transposed weight, as the gradient of hidden states has it."""
    if not has_onednn:
        monkeypatch.setattr(linear_cpu, "onednn", lambda: None)
    rows, weight, bias = torch.randn(5, 33).to(dtype), torch.randn(70, 33).to(dtype), torch.randn(70).to(dtype)
    exact = {torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]
    for given, by, plus in ((rows, weight, bias), (rows, weight, None), (rows @ weight.T, weight.T, None)):
        expected = torch.nn.functional.linear(given.double(), by.double(), None if plus is None else plus.double())
        torch.testing.assert_close(linear_cpu.linear(given, by, plus).double(), expected, rtol=exact, atol=10 * exact)
