"""Divergences between two chunks of logits on CPU, and their gradient, in two passes a row.

    n = rows of a chunk, V = vocabulary; z, t = logits of student and teacher, q, p = their softmax(. / tau)

A row of both (1 MB at V = 128k) is taken from memory once and stays in the core's cache for both passes: the first sums
what the softmaxes and divergences need and leaves the student's exponentials where the gradient is to be, the second
makes the gradient of them. Sums over a block are in float32, over blocks in float64. The difference of
log-probabilities is (z - t) / tau - c, c = log Z_z - log Z_t, which loses less than the difference of two rounded ones.

    reverse  KL(q || p) = sum q (z - t) / tau - c        gradient q ((z - t) / tau - c - KL)
    forward  KL(p || q) = c - sum p (z - t) / tau        gradient q - p
    target   -log q[y]                                   gradient q - onehot(y)
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.ops.cpu import array, exp, jit, spread
from distill.ops.openmp import parallel

BLOCK = 512  # logits summed in float32


@jit
def _largest(row, lanes):
    """The greatest of a row of at least ``lanes.size``; lane by lane, which is what vectorises without assuming that
    there is no NaN (one shows up in the sums)."""
    size = lanes.size
    for j in range(size):
        lanes[j] = row[j]
    for start in range(size, row.size - size + 1, size):
        part = row[start : start + size]
        for j in range(size):
            lanes[j] = part[j] if part[j] > lanes[j] else lanes[j]
    last = row[row.size - size :]
    top = lanes[0]
    for j in range(size):
        lanes[j] = last[j] if last[j] > lanes[j] else lanes[j]
        top = lanes[j] if lanes[j] > top else top
    return top


@jit
def _sums(z, t, top_z, top_t, inverse, kept):
    """Over a row, the sums of e, e d, f and f d; e, f = exp of the tempered logits less the top, d = (z - t) / tau.
    Every e goes to ``kept``."""
    total_e, total_ed, total_f, total_fd = np.zeros(4)
    for start in range(0, z.size, BLOCK):
        part_z, part_t, part_e = z[start : start + BLOCK], t[start : start + BLOCK], kept[start : start + BLOCK]
        sum_e, sum_ed, sum_f, sum_fd = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(part_z.size):
            d = (part_z[i] - part_t[i]) * inverse
            e, f = exp((part_z[i] - top_z) * inverse), exp((part_t[i] - top_t) * inverse)
            part_e[i] = e
            sum_e += e
            sum_ed += e * d
            sum_f += f
            sum_fd += f * d
        total_e += sum_e
        total_ed += sum_ed
        total_f += sum_f
        total_fd += sum_fd
    return total_e, total_ed, total_f, total_fd


@jit
def _rows(first, last, z, t, targets, weights, inverse, scale, gradients, losses):
    """Rows ``first .. last - 1``: losses ``[n]``, and z's gradients ``[n, V]`` times ``scale``, unless they are empty.
    ``weights``: of reverse KL, of forward KL, of the target's -log q."""
    reverse, forward, target = weights[0], weights[1], weights[2]
    lanes, wanted = np.empty(min(64, z.shape[1]), np.float32), gradients.shape[1] > 0
    made = np.empty(z.shape[1], np.float32)
    for n in range(first, last):
        row, other = z[n], t[n]
        if wanted:
            made = gradients[n]
        top_z, top_t = _largest(row, lanes), _largest(other, lanes)
        total_e, total_ed, total_f, total_fd = _sums(row, other, top_z, top_t, inverse, made)
        c = (np.float64(top_z) - np.float64(top_t)) * inverse + np.log(total_e / total_f)
        kl = total_ed / total_e - c
        losses[n] = reverse * kl + forward * (c - total_fd / total_f)
        y = targets[n]
        if target != 0:
            losses[n] += target * (np.log(total_e) - (np.float64(row[y]) - top_z) * inverse)
        if not wanted:
            continue
        slope = np.float32(scale * reverse / total_e)
        constant = np.float32(scale * (forward + target - reverse * (c + kl)) / total_e)
        back = np.float32(scale * forward / total_f)
        if forward != 0:
            for i in range(row.size):
                f = exp((other[i] - top_t) * inverse)
                made[i] = made[i] * (slope * ((row[i] - other[i]) * inverse) + constant) - back * f
        else:
            for i in range(row.size):
                made[i] *= slope * ((row[i] - other[i]) * inverse) + constant
        if target != 0:
            made[y] -= np.float32(scale * target)


@jit
def _rows_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _rows, arguments)


def divergence(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    reverse_kl: float = 0.0,
    forward_kl: float = 0.0,
    cross_entropy: float = 0.0,
    temperature: float = 1.0,
    scale: float = 1.0,
    gradient: Tensor | None = None,
) -> Tensor:
    """Weighted loss of every token, [n] in float64; ``gradient`` [n, V] becomes ``scale`` times that of the student.

    ``student`` and ``teacher`` are contiguous float32 logits [n, V] on CPU, ``targets`` int64 [n]. The gradient is with
    respect to the untempered logits.
    """
    n, vocabulary = student.shape
    losses = np.zeros(n)
    weights = np.array([reverse_kl, forward_kl, cross_entropy])
    z, t, y = array(student, torch.float32), array(teacher, torch.float32), array(targets, torch.int64)
    made = np.empty((n, 0), np.float32) if gradient is None else gradient.numpy()
    inverse = np.float32(1 / temperature)
    spread(_rows_team, n, n * vocabulary, z, t, y, weights, inverse, float(scale / temperature), made, losses)
    return torch.from_numpy(losses)
