"""Sums of a loss over chunks of tokens, and on the way its gradients: by a compiled kernel on CPU, or in plain PyTorch.

Legend: n = valid target tokens, m = tokens of a chunk, V = vocabulary, W = width of a slice of it, E = hidden size.

What costs is four matrix products a chunk, none of them twice: both heads' logits, the gradient of the hidden states
and that of the student's head (left out where it is frozen). The gradients are made while the logits of the chunk are
there: in plain PyTorch as some tensors [m, V], for the compiled kernel (``distill/ops/divergence_cpu.py``) as two of
them and slices [m, W].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from distill.ops.kernels import has_numba

CHUNK_BYTES = 1 << 26
"""The largest [m, V] tensor in plain PyTorch, which holds several."""
COMPILED_VOCABULARY = 4096
"""Where the compiled kernel begins: below, the whole loss is a small part of a step, and plain PyTorch as good."""
TOKENS = 256
"""Those of a chunk in the compiled kernel, at least: for fewer a head is read, and its gradient added to, too often."""
SLICE_BYTES = 1 << 24
"""The largest [m, W] tensor there. From 32 MiB on the C library's allocator maps every result of a product anew, which
takes time; half of that stays in the cache until the kernel reads it."""
EVERY = slice(None)


@dataclass(frozen=True)
class Loss:
    """A loss in both forms: of log-probabilities, and as weights of the terms that the compiled kernel knows."""

    plain: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(log q [m, V], log p [m, V], targets [m]) to the loss per token [m] and its gradient [m, V]."""
    terms: Mapping[str, float]
    needs_teacher: bool = True


class TeacherLogits(Protocol):
    """Where a chunk's teacher logits [m, V] come from."""

    def __call__(
        self, part: slice, columns: slice = EVERY, multiply: Callable[..., Tensor] = nn.functional.linear
    ) -> Tensor:
        """Logits [m, W] of the tokens ``part`` and a part of the vocabulary, by ``multiply(rows, weight, bias)`` where
        they are a product. Made for the caller, who may write over them."""
        ...


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
    """Sum of the loss over all tokens. Of a chunk no logits are kept but those of a slice of the vocabulary; its
    gradient is made slice by slice, and multiplied at once."""
    from distill.ops.divergence_cpu import Chunk
    from distill.ops.linear_cpu import linear

    n, vocabulary, teacher = len(rows), len(weight), teacher if loss.needs_teacher else None
    size = tokens_of_chunk(vocabulary, n)
    slices = in_slices(vocabulary, size)
    chunk = Chunk(slices, **loss.terms, temperature=temperature)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        chunk.begin(targets[part])
        for number, columns in enumerate(slices):
            student = linear(rows[part], weight[columns], None if bias is None else bias[columns])
            other = teacher(part, columns, linear).to(student.dtype) if teacher else torch.zeros_like(student)
            chunk.take(number, student, other)
        total += chunk.losses(1 / float(count)).sum()
        for number, columns in enumerate(slices if gradients.wanted() else ()):
            gradient = chunk.gradient(number)
            if gradients.rows is not None:
                gradients.rows[part] += linear(gradient, weight[columns].T)
            if gradients.weight is not None:
                gradients.weight[columns].addmm_(gradient.T, rows[part], beta=float(start > 0))
            if gradients.bias is not None:
                gradients.bias[columns] += gradient.sum(0)
    return total.to(rows.dtype)


def tokens_of_chunk(vocabulary: int, tokens: int) -> int:
    """Of so many ``tokens`` those that the compiled kernel takes at a time."""
    return max(1, min(tokens, max(TOKENS, SLICE_BYTES // (4 * vocabulary))))


def in_slices(vocabulary: int, tokens: int) -> list[slice]:
    """Equal parts of the vocabulary whose logits of so many tokens are at most ``SLICE_BYTES``."""
    parts = max(1, math.ceil(vocabulary * tokens * 4 / SLICE_BYTES))
    edges = [vocabulary * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


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
