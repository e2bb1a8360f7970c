"""A loss of hidden states through the LM heads, in chunks of tokens, with the gradient made by hand on the way.

Legend: n = valid target tokens, V = vocabulary, E = hidden size.

The gradients are made in forward, chunk by chunk (``distill/loss_chunks.py``); backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.loss_chunks import (
    EVERY,
    Gradients,
    Loss,
    TeacherLogits,
    compiled_serves,
    in_compiled_chunks,
    in_plain_chunks,
)


@contextmanager
def head_logits(rows: Tensor, head: nn.Module) -> Iterator[TeacherLogits]:
    """The logits of a frozen head on its hidden states [n, E]; a sharded head is whole within, gathered once."""

    def logits(part: slice, columns: slice = EVERY, multiply: Callable[..., Tensor] = nn.functional.linear) -> Tensor:
        return multiply(rows[part], weight[columns], None if bias is None else bias[columns])

    with whole_in_zero(head):
        weight, bias = whole_weights(head)
        yield logits


@contextmanager
def whole_in_zero(head: nn.Module) -> Iterator[None]:
    """Within, a frozen head that ZeRO-3 has in shards is whole on every rank. All ranks must come here together."""
    parameters = head.parameters(recurse=False)
    shards = [p for p in parameters if hasattr(p, "ds_id") and not p.numel()]  # whole already: somebody around us did
    if not shards:
        yield
        return
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    with deepspeed.zero.GatheredParameters(shards):
        yield


def whole_weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A head's weight [V, E] and bias [V] (None: it has none), whole where they are in shards.

    Under FSDP2 they are gathered here, once for all chunks, and the gradient goes back to the shards. Under ZeRO-3 the
    student's are gathered by being looked at inside the model's forward, and kept until its backward is done.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    return whole(weight), None if bias is None else whole(bias)


def whole(weight: Any) -> Tensor:
    """A DTensor put together; any other tensor as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def loss_through_head(
    loss: Loss,
    rows: Tensor,
    head: nn.Module,
    teacher: TeacherLogits | None,
    targets: Tensor,
    *,
    temperature: float,
    count: Tensor | float,
) -> Tensor:
    """Sum over tokens of a loss / count, a scalar, from hidden states [n, E] and targets [n].

    ``teacher`` gives the teacher's logits chunk by chunk; a loss that looks at no teacher goes without.
    """
    assert teacher is not None or not loss.needs_teacher
    weight, bias = whole_weights(head)
    return HeadLoss.apply(rows, weight, bias, targets, loss, teacher, temperature, count)


class HeadLoss(torch.autograd.Function):
    """``loss_through_head`` with its gradient to hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss: Loss,
        teacher: TeacherLogits | None,
        temperature: float,
        count: Tensor | float,
    ) -> Tensor:
        exact = torch.promote_types(rows.dtype, torch.float32)
        gradients = Gradients(
            torch.zeros_like(rows) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None,
            torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[2] else None,
        )
        form = in_compiled_chunks if compiled_serves(loss, rows, weight) else in_plain_chunks
        total = form(loss, rows, weight, bias, targets, teacher, temperature, count, gradients)
        ctx.save_for_backward(*[g for g in gradients.all() if g is not None])
        ctx.present = [g is not None for g in gradients.all()]
        ctx.dtypes = [rows.dtype, weight.dtype, bias.dtype if bias is not None else None]
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * grad_outputs[0]).to(dtype) if present else None
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 5)
