"""Attention of one query token over a long cache on CPU, compiled: keys and values are read once, where they lie.

PyTorch's kernel for this shape works a query head at a time, and so reads grouped keys and values once a query head,
with a third to a half of the bandwidth of a copy. Here all query heads of a group go over a piece of the cache at once.

    B = batch, H = query heads, KV = key/value heads, G = H / KV, T = tokens, P = head_dim
"""

# The kernels are typed by numba, when they are compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.ops.cpu import array, exp, jit, spread
from distill.ops.openmp import parallel

PIECE = 64  # keys at a time: their scores and the values stay in the first-level cache


@jit
def _four(flat, at, step, width, left):
    """Four rows of ``width`` from ``at`` on, ``step`` apart; where fewer are ``left``, the last of them again."""
    b = at + step * min(1, left - 1)
    c = at + step * min(2, left - 1)
    d = at + step * min(3, left - 1)
    return flat[at : at + width], flat[b : b + width], flat[c : c + width], flat[d : d + width]


@jit
def _attend(first, last, query, keys, values, places, out, scale):
    """Key/value heads ``first .. last - 1``, numbered over the batch.

    query, out: ``[B * KV, G, P]``; keys, values: flat; places: KV, T and how far apart rows, heads and tokens lie in
    both.
    """
    P, G = query.shape[2], query.shape[1]
    KV, T, over_rows, over_heads, step = places
    zero, one = query.dtype.type(0), query.dtype.type(1)
    weights = np.empty((G, PIECE), query.dtype)
    total = np.empty((G, P), query.dtype)
    largest, mass = np.empty(G, query.dtype), np.empty(G, query.dtype)
    scaled = np.empty((G, P), query.dtype)
    for head in range(first, last):
        begin = head // KV * over_rows + head % KV * over_heads
        for g in range(G):
            largest[g], mass[g] = query.dtype.type(-1e30), zero
            for p in range(P):
                total[g, p] = zero
                scaled[g, p] = query[head, g, p] * scale
        for start in range(0, T, PIECE):
            count = min(PIECE, T - start)
            for t in range(0, count, 4):  # four sums at a time, or a core waits for each
                k0, k1, k2, k3 = _four(keys, begin + (start + t) * step, step, P, count - t)
                for g in range(G):
                    s0, s1, s2, s3 = zero, zero, zero, zero
                    for p in range(P):
                        q = scaled[g, p]
                        s0 += q * k0[p]
                        s1 += q * k1[p]
                        s2 += q * k2[p]
                        s3 += q * k3[p]
                    weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3] = s0, s1, s2, s3
            for g in range(G):
                top = largest[g]
                for t in range(count):
                    top = max(top, weights[g, t])
                again = exp(largest[g] - top)  # what is there already is scaled to the new maximum
                largest[g] = top
                added = zero
                for t in range(count):
                    weights[g, t] = exp(weights[g, t] - top)
                for t in range(count):
                    added += weights[g, t]
                mass[g] = mass[g] * again + added
                for p in range(P):
                    total[g, p] *= again
                for t in range(count, -(-count // 4) * 4):
                    weights[g, t] = zero
            for t in range(0, count, 4):
                v0, v1, v2, v3 = _four(values, begin + (start + t) * step, step, P, count - t)
                for g in range(G):
                    w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
                    for p in range(P):
                        total[g, p] += (w0 * v0[p] + w1 * v1[p]) + (w2 * v2[p] + w3 * v3[p])
        for g in range(G):
            share = one / mass[g]
            for p in range(P):
                out[head, g, p] = total[g, p] * share


@jit
def _attend_team(team, threads, tasks, pieces, arguments):
    parallel(team, threads, tasks, pieces, _attend, arguments)


def _flat(tensor: Tensor) -> Any:
    """All that lies between the first and the last element of ``tensor``, as one contiguous row."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.as_strided((reach,), (1,)).numpy()


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * query keys^T) values, ``[B, H, 1, P]``, for float32 on CPU.

    Args:
        query: ``[B, H, 1, P]``. keys, values: ``[B, KV, T, P]``, possibly views of longer buffers; T at least 1.
    """
    batch, heads, _, width = query.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = array(query, torch.float32).reshape(batch * kv_heads, heads // kv_heads, width)
    out = torch.empty(batch, heads, 1, width, dtype=torch.float32, device="cpu")
    into = out.numpy().reshape(grouped.shape)
    spread(
        _attend_team, batch * kv_heads, batch * kv_heads * tokens * width,
        grouped, _flat(keys), _flat(values), (kv_heads, tokens, *keys.stride()[:3]), into, np.float32(scale),
    )  # fmt: skip
    return out
