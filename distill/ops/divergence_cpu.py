"""Divergences between logits of student and teacher on CPU, and their gradient, from slices of the vocabulary.

    n = tokens of a chunk, V = vocabulary, W = width of a slice of it
    z, t = logits of student and teacher; q, p = their softmax(. / tau); d = (z - t) / tau
    e = exp((z - top) / tau), top the largest z of the slice; f is the same of t

A slice of both is read right after it was multiplied, while it is in the cache; e and d take the place of z and t (f,
for forward KL, one of its own). Of every row stay the sums that its softmaxes and divergences are made of. When all
slices were there, the gradient is made in e's place, and no exponential is taken twice. Sums over a block are in
float32, beyond it in float64. The difference of log-probabilities is d - c, c = log Z_z - log Z_t: it loses less than
that of two rounded ones.

    reverse  KL(q || p) = sum q d - c        gradient q (d - c - KL)
    forward  KL(p || q) = c - sum p d        gradient q - p
    target   -log q[y]                       gradient q - onehot(y)
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


class Chunk:
    """Losses of n tokens and the gradient of their logits: ``take`` every slice, then ``losses``, then ``gradient`` of
    each.

    One object serves chunk after chunk (``begin``).

    Args:
        slices: the parts of the vocabulary, from its first to its last.
        reverse_kl, forward_kl, cross_entropy: the weights of the terms.
    """

    def __init__(
        self,
        slices: list[slice],
        *,
        reverse_kl: float = 0.0,
        forward_kl: float = 0.0,
        cross_entropy: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.slices, self.tau = slices, temperature
        self.reverse, self.forward, self.target = reverse_kl, forward_kl, cross_entropy
        nothing = np.empty((0, 0), np.float32)
        self.kept = [(nothing, nothing, nothing)] * len(slices)  # e, d, f [n, W] of every slice

    def begin(self, targets: Tensor) -> None:
        """A chunk of tokens with these targets, int64 [n]."""
        self.targets = array(targets, torch.int64)
        self.sums = np.empty((len(self.slices), len(targets), 7))

    def take(self, number: int, student: Tensor, teacher: Tensor) -> None:
        """Slice ``number`` of the logits of both [n, W], float32 and contiguous, which are written over."""
        z, t = array(student, torch.float32), array(teacher, torch.float32)
        f = np.empty_like(t) if self.forward else self.kept[number][2]
        first, inverse = self.slices[number].start, np.float32(1 / self.tau)
        spread(_take_team, len(z), z.size, z, t, f, self.targets, first, inverse, self.sums[number])
        self.kept[number] = z, t, f

    @np.errstate(all="ignore")  # a NaN has to come out, without a word on the way
    def losses(self, scale: float = 1.0) -> Tensor:
        """Weighted loss of every token, [n] in float64. The gradients will be ``scale`` times that of the logits (not
        tempered) of their sum."""
        top_z, top_t, e, ed, f, fd, target = np.moveaxis(self.sums, 2, 0)  # each [slices, n]
        highest_z, highest_t = top_z.max(0), top_t.max(0)
        part_z, part_t = np.exp((top_z - highest_z) / self.tau), np.exp((top_t - highest_t) / self.tau)
        e, ed, f, fd = (part_z * e).sum(0), (part_z * ed).sum(0), (part_t * f).sum(0), (part_t * fd).sum(0)
        c = (highest_z - highest_t) / self.tau + np.log(e / f)
        kl = ed / e - c
        scale /= self.tau
        constant = self.forward + self.target - self.reverse * (c + kl)
        self.factors = [
            (scale * share).astype(np.float32)
            for share in (part_z * (self.reverse / e), part_z * (constant / e), part_t * (self.forward / f))
        ]
        self.one_hot = scale * self.target
        losses = self.reverse * kl + self.forward * (c - fd / f)
        if self.target:
            losses += self.target * (np.log(e) - (target.sum(0) - highest_z) / self.tau)
        return torch.from_numpy(losses)

    def gradient(self, number: int) -> Tensor:
        """Of the logits of slice ``number``, [n, W], until the next chunk's is taken."""
        made, d, f = self.kept[number]
        slope, constant, back = (factor[number] for factor in self.factors)
        spread(_gradient_team, len(made), made.size, made, d, f, slope, constant, back)
        if self.target:
            part = self.slices[number]
            rows = np.nonzero((self.targets >= part.start) & (self.targets < part.stop))[0]
            made[rows, self.targets[rows] - part.start] -= np.float32(self.one_hot)
        return torch.from_numpy(made)


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
def _take(first, last, z, t, kept_f, targets, column, inverse, sums):
    """Rows ``first .. last - 1`` of a slice that begins at ``column``: tops, sums of e, e d, f, f d and the target's
    logit (0: elsewhere) to ``sums`` [n, 7]; e to ``z``, d to ``t``, f to ``kept_f``, unless that is empty."""
    lanes, spare = np.empty(min(64, z.shape[1]), np.float32), np.empty(BLOCK, np.float32)
    for n in range(first, last):
        row, y = sums[n], targets[n] - column
        row[6] = z[n, y] if 0 <= y < z.shape[1] else 0.0
        top_z, top_t = _largest(z[n], lanes), _largest(t[n], lanes)
        total_e, total_ed, total_f, total_fd = np.zeros(4)
        for start in range(0, z.shape[1], BLOCK):
            zs, ts = z[n, start : start + BLOCK], t[n, start : start + BLOCK]
            fs = spare
            if kept_f.size > 0:
                fs = kept_f[n, start : start + BLOCK]
            sum_e, sum_ed, sum_f, sum_fd = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(zs.size):
                d = (zs[i] - ts[i]) * inverse
                e, f = exp((zs[i] - top_z) * inverse), exp((ts[i] - top_t) * inverse)
                zs[i], ts[i], fs[i] = e, d, f
                sum_e += e
                sum_ed += e * d
                sum_f += f
                sum_fd += f * d
            total_e += sum_e
            total_ed += sum_ed
            total_f += sum_f
            total_fd += sum_fd
        row[0], row[1], row[2], row[3], row[4], row[5] = top_z, top_t, total_e, total_ed, total_f, total_fd


@jit
def _gradient(first, last, made, d, f, slope, constant, back):
    """Rows ``first .. last - 1`` of ``made`` [n, W], which holds e, become e (slope d + constant) - back f."""
    for n in range(first, last):
        row, ds, a, b = made[n], d[n], slope[n], constant[n]
        if f.size > 0:
            fs, g = f[n], back[n]
            for i in range(row.size):
                row[i] = row[i] * (a * ds[i] + b) - g * fs[i]
        else:
            for i in range(row.size):
                row[i] *= a * ds[i] + b


@jit
def _take_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _take, arguments)


@jit
def _gradient_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _gradient, arguments)
