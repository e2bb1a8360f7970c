"""What a machine can do: copy bandwidth and matrix products, measured here, or as the maker of a device gives them.

A roofline (`eval.roofline`) is made of these.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distill.errors import choose
from distill.machine import of_group
from distill.ops.cpu import exp, jit, spread
from distill.ops.openmp import parallel

GB = 1e9


def synchronize(device: torch.device | str) -> None:
    """Wait for a GPU to finish what it was given; nothing on CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def fastest(run: Callable[[], object], seconds: float = 0.3, least: int = 3, device: str = "cpu") -> float:
    """Seconds of the fastest of many runs: what the machine can do, not what else it did."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


@jit
def _exps(first, last, values, out, rounds):  # type: ignore[no-untyped-def]
    for task in range(first, last):
        row, into = values[task], out[task]
        for _ in range(rounds):
            for i in range(row.size):
                into[i] = exp(row[i])


@jit
def _exps_team(team, threads, tasks, pieces, arguments):  # type: ignore[no-untyped-def]
    parallel(team, threads, tasks, pieces, _exps, arguments)


@dataclass(frozen=True)
class Machine:
    """Bytes/s of a copy (read and written counted), flop/s of a matrix product, exponentials/s (on CPU)."""

    name: str
    copy: float
    gemm: float
    exps: float = float("inf")
    memory: float = 0.0
    """Bytes, all told."""
    measured: bool = True
    """Measured by us, or what its maker says."""

    @classmethod
    def measure(cls, device: str = "cpu", dtype: torch.dtype = torch.float32, *, again: bool = False) -> Machine:
        """Measure with PyTorch's present number of threads, about two seconds, once a process or ``again``."""
        if again:
            _measured.cache_clear()
        return _measured(device, dtype, torch.get_num_threads())

    def seconds(self, *, flops: float = 0, nbytes: float = 0, exps: float = 0) -> float:
        """The least time for that much work, as if bytes, products and exponentials overlapped fully."""
        return max(flops / self.gemm, nbytes / self.copy, exps / self.exps)

    def __str__(self) -> str:
        exps = "" if self.exps == float("inf") else f", exp {self.exps / 1e9:.2f} G/s"
        source = "" if self.measured else " (as published)"
        return f"{self.name}: copy {self.copy / GB:,.1f} GB/s, products {self.gemm / 1e9:,.0f} GFLOP/s{exps}{source}"


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> Machine:
    cuda = torch.device(device).type == "cuda"
    source = torch.ones(1 << (29 if cuda else 26), device=device)  # 256 MiB, 2 GiB: beyond every cache
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source), device=device)
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    gemm = 2 * size**3 / fastest(lambda: torch.mm(a, b), device=device)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        return Machine(properties.name, copy, gemm, memory=float(properties.total_memory))
    values, rounds = -np.random.default_rng(0).random((4 * threads, 2048), np.float32), 64
    out = np.empty_like(values)
    work = values.size * rounds
    ours = work / fastest(lambda: spread(_exps_team, len(values), work, values, out, rounds))
    small = torch.from_numpy(values)
    theirs = values.size / fastest(lambda: torch.exp(small, out=small.clone()))
    return Machine(f"{threads} CPU threads", copy, gemm, max(ours, theirs), memory_of_this_machine())


def memory_of_this_machine() -> float:
    """Bytes of main memory, or what the control group that we run in may use of it."""
    return min(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), of_group("memory.max"))


def _published(name: str, tera: float, gigabytes_per_second: float, gigabytes: float) -> Machine:
    return Machine(name, gigabytes_per_second * GB, tera * 1e12, memory=gigabytes * GB, measured=False)


THIS = "this"
DEVICES: dict[str, Machine] = {
    "h100": _published("H100 SXM", 989, 3350, 80),
    "h100-pcie": _published("H100 PCIe", 756, 2000, 80),
    "h200": _published("H200 SXM", 989, 4800, 141),
    "b200": _published("B200 SXM", 2250, 8000, 180),
    "a100": _published("A100 SXM 80 GB", 312, 2039, 80),
    "a100-40gb": _published("A100 SXM 40 GB", 312, 1555, 40),
    "l40s": _published("L40S", 362, 864, 48),
    "l4": _published("L4", 121, 300, 24),
    "rtx4090": _published("RTX 4090", 165, 1008, 24),
    "mi300x": _published("MI300X", 1307, 5300, 192),
}
"""Dense bf16 products without sparsity, memory bandwidth and size, from the makers' data sheets."""


def named(name: str, dtype: torch.dtype = torch.float32) -> Machine:
    """The machine of that name; ``this`` is measured. UserError for one that is not in the table."""
    key = choose("device", name.lower(), [THIS, *DEVICES])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine.measure(device, dtype) if key == THIS else DEVICES[key]
