"""Distillation losses between next-token distributions, exact, in chunks from the hidden states.

Legend: n = valid target tokens, V = vocabulary, E = hidden size, tau = temperature, count = valid targets of the
global batch. q = softmax(z_student / tau), p = softmax(z_teacher / tau), both in fp32 (fp64 for fp64 inputs).

Each loss is a function of log-probabilities that returns the loss per token [n] and its gradient with respect to
the student's tempered logits [n, V]; ``distillation_loss`` does the rest. No [tokens, V] tensor outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from distill.data.pack import IGNORE
from distill.errors import choose

CHUNK_BYTES = 1 << 26  # the largest [chunk, V] tensor


def reverse_kl(log_q: Tensor, log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = sum_v q (log q - log p); gradient q (log q - log p - KL). Apriel-H1, eq. (5)."""
    q = log_q.exp()
    ratio = log_q - log_p
    loss = (q * ratio).sum(-1)
    return loss, q * (ratio - loss.unsqueeze(-1))


def forward_kl(log_q: Tensor, log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = sum_v p (log p - log q); gradient q - p."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def jsd(log_q: Tensor, log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon: KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; gradient q (log q/m - KL(q || m)) / 2."""
    log_m = torch.logaddexp(log_q, log_p) - torch.log(log_q.new_tensor(2.0))
    q, ratio = log_q.exp(), log_q - log_m
    to_mean = (q * ratio).sum(-1)
    loss = 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + to_mean)
    return loss, 0.5 * q * (ratio - to_mean.unsqueeze(-1))


def annealed_kl(log_q: Tensor, log_p: Tensor, targets: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
    """(1 - progress) KL(teacher || student) + progress KL(student || teacher): forward turns into reverse."""
    (forward, forward_gradient), (reverse, reverse_gradient) = (
        f(log_q, log_p, targets) for f in (forward_kl, reverse_kl)
    )
    return torch.lerp(forward, reverse, progress), torch.lerp(forward_gradient, reverse_gradient, progress)


def cross_entropy(log_q: Tensor, log_p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log q of the target token; the teacher is not looked at. Gradient q - onehot."""
    gradient = log_q.exp()
    gradient.scatter_add_(1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -1.0))
    return -log_q.gather(1, targets.unsqueeze(1)).squeeze(1), gradient


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "annealed_kl": annealed_kl,
    "cross_entropy": cross_entropy,
}


def valid_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``hidden`` [B, T, E] that predict a target, [n, E], and the targets [n]: position t predicts t + 1."""
    keep = labels[:, 1:] != IGNORE
    return hidden[:, :-1][keep], labels[:, 1:][keep]


def distillation_loss(
    name: str,
    hidden: Tensor,
    head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    count: Tensor | float | None = None,
    progress: float = 1.0,
) -> Tensor:
    """The loss ``name`` of a batch, a scalar, divided by ``count`` (by default the valid targets of this batch).

    Args:
        hidden, teacher_hidden: final hidden states [B, T, E] and [B, T, E'].
        head, teacher_head: LM heads (``weight`` [V, E] and [V, E'], optional ``bias`` [V]).
        labels: [B, T], not shifted; -100 where no loss is taken.
        progress: share of the training that is over, for a loss that changes on the way (``annealed_kl``).

    No valid target, here or in the global batch, gives 0 (with a zero gradient), not NaN.
    """
    choose("loss", name, LOSSES)
    loss = partial(annealed_kl, progress=progress) if name == "annealed_kl" else LOSSES[name]
    rows, targets = valid_targets(hidden, labels)
    with torch.no_grad():
        teacher_rows, _ = valid_targets(teacher_hidden, labels)
    if count is None:
        count = float(len(targets))
    count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
    return ChunkedLoss.apply(
        rows, head.weight, head.bias, teacher_rows, teacher_head.weight, teacher_head.bias,
        targets, loss, temperature, count,
    )  # fmt: skip


class ChunkedLoss(torch.autograd.Function):
    """Sum over tokens of a loss / count. The gradients are made chunk by chunk in forward, so that the logits of
    both models exist only for one chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_rows: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        targets: Tensor,
        loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        temperature: float,
        count: Tensor | float,
    ) -> Tensor:
        exact = torch.promote_types(rows.dtype, torch.float32)
        chunk = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        total = rows.new_zeros((), dtype=exact)
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[2] else None
        needs_teacher = loss is not cross_entropy
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            h = rows[part]
            log_q = log_softmax(nn.functional.linear(h, weight, bias).to(exact) / temperature, -1)
            log_p = log_q
            if needs_teacher:
                logits = nn.functional.linear(teacher_rows[part], teacher_weight, teacher_bias)
                log_p = log_softmax(logits.to(exact) / temperature, -1)
            values, gradient = loss(log_q, log_p, targets[part])
            total += values.sum()
            gradient = gradient / (temperature * count)
            if grad_rows is not None:
                grad_rows[part] = gradient.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += (gradient.to(h.dtype).T @ h).to(exact)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.save_for_backward(*[g for g in (grad_rows, grad_weight, grad_bias) if g is not None])
        ctx.present = [g is not None for g in (grad_rows, grad_weight, grad_bias)]
        ctx.dtypes = [rows.dtype, weight.dtype, bias.dtype if bias is not None else None]
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * grad_outputs[0]).to(dtype) if present else None
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 7)
