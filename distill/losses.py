"""Distillation losses between next-token distributions, exact, in chunks from the hidden states.

Legend: n = valid target tokens, V = vocabulary, E = hidden size, tau = temperature, count = valid targets of the
global batch. q = softmax(z_student / tau), p = softmax(z_teacher / tau), both in fp32 (fp64 for fp64 inputs).

Each loss is a function of log-probabilities that returns the loss per token [n] and its gradient with respect to
the student's tempered logits [n, V]; one of several terms is written ``0.9 reverse_kl + 0.1 cross_entropy``.
``distillation_loss`` takes it through the LM heads (``distill/head_loss.py``). No [tokens, V] tensor outlives a chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.pack import IGNORE
from distill.errors import UserError, choose
from distill.head_loss import head_logits, loss_through_head
from distill.loss_chunks import Loss, TeacherLogits
from distill.stored_logits import StoredRows

EXAMPLE = "'reverse_kl', or terms with weights: '0.9 reverse_kl + 0.1 cross_entropy'"


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
WITHOUT_TEACHER = ("cross_entropy",)


def terms_of(loss: str, key: str = "loss") -> dict[str, float]:
    """The terms of a loss with their weights: ``reverse_kl``, or ``0.9 reverse_kl + 0.1 cross_entropy``.

    Raises UserError, with the ``key`` it came from, for a name that there is not (naming the nearest), a term twice,
    and weights that cannot be.
    """
    terms: dict[str, float] = {}
    for part in loss.split("+"):
        found = re.fullmatch(r"\s*(?:([0-9.]+(?:[eE]-?[0-9]+)?)\s*\*?\s+|([0-9.]+)\*)?([A-Za-z_][\w-]*)\s*", part)
        if found is None:
            raise UserError(
                f"{key}='{loss[:120]}' cannot be read: write {EXAMPLE}; there are {', '.join(sorted(LOSSES))}"
            )
        name, weight = choose(key, found[3], LOSSES), _number(found[1] or found[2] or "1")
        if name in terms:
            raise UserError(f"{key}='{loss}' has {name} twice")
        if not 0 < weight < math.inf:
            raise UserError(f"{key}='{loss}': the weight of {name} must be a number above 0; write {EXAMPLE}")
        terms[name] = weight
    return terms


def _number(text: str) -> float:
    return float(text) if text.count(".") < 2 and text != "." else math.nan


def needs_teacher(loss: str) -> bool:
    """Whether any term looks at the teacher."""
    return any(name not in WITHOUT_TEACHER for name in terms_of(loss))


def build_loss(loss: str, progress: float = 1.0) -> Loss:
    """The loss as the chunks take it; ``progress`` (0 to 1) is how much of the training is over."""
    terms = terms_of(loss)
    functions = {name: LOSSES[name] for name in terms}
    if "annealed_kl" in functions:
        functions["annealed_kl"] = partial(annealed_kl, progress=progress)
    plain = next(iter(functions.values())) if list(terms.values()) == [1.0] else partial(weighted, functions, terms)
    parts = {name: weight for name, weight in terms.items() if name != "annealed_kl"}
    if annealed := terms.get("annealed_kl", 0.0):
        for name, share in (("forward_kl", 1 - progress), ("reverse_kl", progress)):
            parts[name] = parts.get(name, 0.0) + annealed * share
    return Loss(plain, parts, needs_teacher(loss))


def weighted(
    functions: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]],
    terms: Mapping[str, float],
    log_q: Tensor,
    log_p: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of several losses and of their gradients."""
    values, gradient = log_q.new_zeros(len(log_q)), torch.zeros_like(log_q)
    for name, weight in terms.items():
        value, slope = functions[name](log_q, log_p, targets)
        values += weight * value
        gradient.add_(slope, alpha=weight)
    return values, gradient


def valid_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``hidden`` [B, T, E] that predict a target, [n, E], and the targets [n]: position t predicts t + 1."""
    keep = labels[:, 1:] != IGNORE
    return hidden[:, :-1][keep], labels[:, 1:][keep]


def count_targets(labels: Tensor) -> Tensor:
    """How many targets labels [B, T] (not shifted) have: none is predicted at position 0."""
    return (labels[:, 1:] != IGNORE).sum()


def distillation_loss(
    loss: str,
    hidden: Tensor,
    head: nn.Module,
    teacher_hidden: Tensor | StoredRows,
    teacher_head: nn.Module | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    count: Tensor | float | None = None,
    progress: float = 1.0,
) -> Tensor:
    """A loss of a batch, a scalar, divided by ``count`` (by default the valid targets of this batch).

    Args:
        loss: its name, or its terms with their weights (``terms_of``).
        hidden, teacher_hidden: final hidden states [B, T, E] and [B, T, E']; of an offline teacher what it has stored.
        head, teacher_head: LM heads (``weight`` [V, E] and [V, E'], optional ``bias`` [V]).
        labels: [B, T], not shifted; -100 where no loss is taken.
        count: valid targets of the global batch (all ranks, all accumulation steps).
        progress: share of the training that is over, for a loss that changes on the way (``annealed_kl``).

    No valid target, here or in the global batch, gives 0 (with a zero gradient), not NaN.
    """
    options: Any = {"temperature": temperature, "count": count, "progress": progress}
    if isinstance(teacher_hidden, StoredRows):
        return loss_of_batch(loss, hidden, head, teacher_hidden.logits(labels), labels, **options)
    assert teacher_head is not None
    with torch.no_grad():
        teacher_rows, _ = valid_targets(teacher_hidden, labels)
    with head_logits(teacher_rows, teacher_head) as teacher:
        return loss_of_batch(loss, hidden, head, teacher, labels, **options)


def loss_of_batch(
    loss: str,
    hidden: Tensor,
    head: nn.Module,
    teacher: TeacherLogits | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    count: Tensor | float | None = None,
    progress: float = 1.0,
) -> Tensor:
    """As ``distillation_loss``, of any source of the teacher's logits (None: of a loss that looks at no teacher)."""
    rows, targets = valid_targets(hidden, labels)
    if count is None:
        count = float(len(targets))
    count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
    return loss_through_head(
        build_loss(loss, progress), rows, head, teacher, targets, temperature=temperature, count=count
    )
