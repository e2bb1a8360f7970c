"""PyTorch's own threads for our kernels: each takes part, a fault comes out, a forked child does without."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from distill.ops import openmp
from distill.ops.cpu import jit, spread
from distill.ops.openmp import parallel

pytestmark = pytest.mark.skipif(openmp.team() is None, reason="PyTorch has another OpenMP than GNU's here")


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@jit
def _fill(first, last, values):  # type: ignore[no-untyped-def]
    for task in range(first, last):
        values[task] += task


@jit
def _fill_team(team, threads, tasks, pieces, arguments):  # type: ignore[no-untyped-def]
    parallel(team, threads, tasks, pieces, _fill, arguments)


_this_thread = ctypes.CDLL(None).pthread_self
_this_thread.restype, _this_thread.argtypes = ctypes.c_ulong, []


@njit(nogil=True)
def _sign(first, last, seen, work):  # type: ignore[no-untyped-def]
    for task in range(first, last):
        seen[task] = _this_thread()
        for i in range(1 << 16):
            work[task] += i % 7


@njit(nogil=True)
def _sign_team(team, threads, tasks, pieces, arguments):  # type: ignore[no-untyped-def]
    parallel(team, threads, tasks, pieces, _sign, arguments)


@jit
def _greedy(first, last, size, out):  # type: ignore[no-untyped-def]
    for task in range(first, last):
        out[task] = np.ones(size)[task]


@jit
def _greedy_team(team, threads, tasks, pieces, arguments):  # type: ignore[no-untyped-def]
    parallel(team, threads, tasks, pieces, _greedy, arguments)


def test_every_thread_takes_part() -> None:
    torch.set_num_threads(3)
    ids: set[int] = set()
    for _ in range(50):  # a busy machine may not let a thread come in time
        seen = np.zeros(60, np.uint64)
        spread(_sign_team, 60, 1 << 30, seen, np.zeros(60))
        ids |= set(seen.tolist())
        if len(ids) == 3:
            break
    assert len(ids) == 3 and _this_thread() in ids


def test_a_kernel_without_room_for_its_buffers_is_told() -> None:
    torch.set_num_threads(2)
    with pytest.raises(MemoryError, match="buffers"):
        spread(_greedy_team, 100, 1 << 30, 1 << 60, np.zeros(100))


def filled() -> Any:
    torch.set_num_threads(2)
    torch.ones(1 << 16).mul_(2)  # PyTorch's threads are there, and spin
    values = np.zeros(1000)
    spread(_fill_team, 1000, 1 << 30, values)
    return values


def _in_child(queue: Any) -> None:
    assert openmp.team() is None
    values = np.zeros(1000)
    spread(_fill_team, 1000, 1 << 30, values)
    queue.put(values)


def test_all_tasks_are_done_once_also_in_a_forked_child_and_from_several_threads() -> None:
    want = np.arange(1000.0)
    assert (filled() == want).all()
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert (queue.get(timeout=60) == want).all()
    child.join(20)
    assert child.exitcode == 0
    found: list[Any] = []
    callers = [threading.Thread(target=lambda: found.append(filled())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 4 and all((values == want).all() for values in found)


BITS = """
import hashlib, torch
from distill.ops import block_cpu, selective_scan
torch.manual_seed(0)
torch.set_num_threads(1)
draw = torch.randn
norm, mlp = (draw(48), 1e-5), (draw(64, 48), draw(64, 48), draw(48, 64))
found = [*block_cpu.rest(draw(5, 48), draw(5, 48), norm, mlp, norm, draw(70, 48))]
x, dt, B = draw(2, 9, 32), draw(2, 9, 32).abs(), draw(2, 9, 2, 16)
found += selective_scan.selective_scan(x, dt, -draw(32, 16).exp(), B, B.flip(1), draw(32), kernel="cpu")
print(hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in found)).hexdigest())
"""


def test_a_process_that_compiles_gives_the_bits_of_one_that_finds_it_compiled(tmp_path: Path) -> None:
    """A resumed run has its kernels from numba's cache, the one that was killed may have compiled them."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    bits = [
        subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert bits[0] == bits[1] and len(bits[0]) == 65
