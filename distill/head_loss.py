"""A loss of hidden states through the LM heads, in chunks of tokens, with the gradient made by hand on the way.

Legend: n = valid target tokens, m = tokens of a chunk, V = vocabulary, E = hidden size.

What costs is four matrix products a chunk, none of them twice: both heads' logits, the gradient of the hidden states
and that of the student's head (left out where it is frozen). The gradients are made in forward, while the logits of the
chunk are there; backward only scales them. Of [m, V] tensors there are one and two small ones where a compiled kernel
takes the chunk (``distill/ops/divergence_cpu.py``), a few more in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from distill.ops.kernels import has_numba

CHUNK_BYTES = 1 << 26  # the largest [m, V] tensor in plain PyTorch, which holds several
COMPILED_BYTES = 1 << 28  # the same of the gradient that the compiled kernel makes
LOGITS_BYTES = 1 << 25  # and of the logits it makes it from: as much as the C library's allocator gives again
FEW = 128  # tokens that are worth reading a head for, however large their logits are (64 take a sixth longer each)
COMPILED_VOCABULARY = 4096
"""Where the compiled kernel begins: below, the whole loss is a small part of a step, and plain PyTorch as good."""


@dataclass(frozen=True)
class Loss:
    """A loss in both forms: of log-probabilities, and as weights of the terms that the compiled kernel knows."""

    plain: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(log q [m, V], log p [m, V], targets [m]) to the loss per token [m] and its gradient [m, V]."""
    terms: Mapping[str, float]
    needs_teacher: bool = True


class TeacherLogits(Protocol):
    """Where a chunk's teacher logits [m, V] come from."""

    def __call__(self, part: slice, multiply: Callable[..., Tensor] = nn.functional.linear) -> Tensor:
        """Logits of the tokens ``part``, by ``multiply(rows, weight, bias)`` where they are a product."""
        ...


@contextmanager
def head_logits(rows: Tensor, head: nn.Module) -> Iterator[TeacherLogits]:
    """The logits of a frozen head on its hidden states [n, E]; a sharded head is whole within, gathered once."""

    def logits(part: slice, multiply: Callable[..., Tensor] = nn.functional.linear) -> Tensor:
        return multiply(rows[part], weight, bias)

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


@dataclass
class Gradients:
    """Those that are wanted; the chunks are added up in them."""

    rows: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def all(self) -> tuple[Tensor | None, ...]:
        return self.rows, self.weight, self.bias

    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self.all())


def compiled_serves(loss: Loss, rows: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel takes a loss: float32 on CPU, a vocabulary that is worth it, and terms it knows."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and len(weight) >= COMPILED_VOCABULARY
        and loss.terms.keys() <= {"reverse_kl", "forward_kl", "cross_entropy"}
        and has_numba()
    )


def in_compiled_chunks(
    loss: Loss,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher: TeacherLogits | None,
    temperature: float,
    count: Tensor | float,
    gradients: Gradients,
) -> Tensor:
    """Sum of the loss over all tokens. The gradient of a chunk's logits fills one buffer [m, V], from the logits of a
    few of its tokens at a time."""
    from distill.ops.divergence_cpu import divergence
    from distill.ops.linear_cpu import linear

    n, vocabulary = len(rows), len(weight)
    size = max(1, min(n, COMPILED_BYTES // (vocabulary * 4)))
    some = max(1, min(size, max(FEW, LOGITS_BYTES // (vocabulary * 4))))
    buffer = rows.new_empty(size, vocabulary) if gradients.wanted() else None
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        gradient = buffer[: chunk.stop - start] if buffer is not None else None
        for first in range(start, chunk.stop, some):
            part = slice(first, min(first + some, chunk.stop))
            student = linear(rows[part], weight, bias)
            other = teacher(part, linear).to(student.dtype) if teacher is not None and loss.needs_teacher else student
            out = gradient[first - start : part.stop - start] if gradient is not None else None
            total += divergence(
                student, other, targets[part], **loss.terms, temperature=temperature, scale=1 / float(count),
                gradient=out,
            ).sum()  # fmt: skip
        if gradient is None:
            continue
        if gradients.rows is not None:
            gradients.rows[chunk] = linear(gradient, weight.T)
        if gradients.weight is not None:
            gradients.weight.addmm_(gradient.T, rows[chunk], beta=float(start > 0))
        if gradients.bias is not None:
            gradients.bias += gradient.sum(0)
    return total.to(rows.dtype)


def in_plain_chunks(
    loss: Loss,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher: TeacherLogits | None,
    temperature: float,
    count: Tensor | float,
    gradients: Gradients,
) -> Tensor:
    """Sum of the loss over all tokens, in plain PyTorch: any device and type, and every loss."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    size = max(1, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
    total = rows.new_zeros((), dtype=exact)
    divergence = fused_divergence() if on_cuda(rows) and has_triton() else plain_divergence
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        h = rows[part]
        logits = nn.functional.linear(h, weight, bias).to(exact)
        other = teacher(part).to(exact) if teacher is not None and loss.needs_teacher else None
        values, gradient = divergence(loss.plain, logits, other, targets[part], temperature)
        total += values.sum()
        if not gradients.wanted():
            continue
        gradient = gradient / (temperature * count)
        if gradients.rows is not None:
            gradients.rows[part] = gradient.to(weight.dtype) @ weight
        if gradients.weight is not None:
            gradients.weight += (gradient.to(h.dtype).T @ h).to(exact)
        if gradients.bias is not None:
            gradients.bias += gradient.sum(0)
    return total


def plain_divergence(
    loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    other: Tensor | None,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss per token [m] and its gradient [m, V] of a chunk's logits [m, V] and the teacher's."""
    log_q = log_softmax(logits / temperature, -1)
    log_p = log_q if other is None else log_softmax(other / temperature, -1)
    return loss(log_q, log_p, targets)


@functools.cache
def fused_divergence() -> Callable[..., tuple[Tensor, Tensor]]:
    """``plain_divergence`` compiled for CUDA, its passes over [m, V] fused; not measured on a GPU yet."""
    return torch.compile(plain_divergence, dynamic=True)


def on_cuda(rows: Tensor) -> bool:
    return rows.device.type == "cuda"


@functools.cache
def has_triton() -> bool:
    """Whether torch can compile for CUDA here."""
    from torch.utils._triton import has_triton as found

    return bool(found())
