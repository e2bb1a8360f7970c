"""What this machine can do, measured: copy bandwidth, matrix products, exponentials. What a roofline is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distill.ops.cpu import exp, jit, spread


def fastest(run: Callable[[], object], seconds: float = 0.3, least: int = 3) -> float:
    """Seconds of the fastest of many runs: what the machine can do, not what else it did."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


@jit
def _exps(first, last, values, out, rounds):  # type: ignore[no-untyped-def]
    for task in range(first, last):
        row, into = values[task], out[task]
        for _ in range(rounds):
            for i in range(row.size):
                into[i] = exp(row[i])


@dataclass
class Machine:
    """Bytes/s of a copy (read and written counted), flop/s of a float32 matrix product, exponentials/s."""

    threads: int
    copy: float
    gemm: float
    exps: float

    @classmethod
    def measure(cls) -> Machine:
        """Measure with PyTorch's present number of threads; about two seconds."""
        source = torch.ones(1 << 26)  # 256 MiB: beyond every cache
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / fastest(lambda: target.copy_(source))
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        gemm = 2 * 1024**3 / fastest(lambda: torch.mm(a, b))
        threads = torch.get_num_threads()
        values, rounds = -np.random.default_rng(0).random((4 * threads, 2048), np.float32), 64
        out = np.empty_like(values)
        work = values.size * rounds
        ours = work / fastest(lambda: spread(_exps, len(values), work, values, out, rounds))
        small = torch.from_numpy(values)
        theirs = values.size / fastest(lambda: torch.exp(small, out=small.clone()))
        return cls(threads, copy, gemm, max(ours, theirs))

    def seconds(self, *, flops: float = 0, nbytes: float = 0, exps: float = 0) -> float:
        """The least time for that much work, as if bytes, products and exponentials overlapped fully."""
        return max(flops / self.gemm, nbytes / self.copy, exps / self.exps)

    def __str__(self) -> str:
        return (
            f"{self.threads} threads: copy {self.copy / 1e9:.1f} GB/s, "
            f"products {self.gemm / 1e9:.0f} GFLOP/s, exp {self.exps / 1e9:.2f} G/s"
        )
