"""PyTorch's own threads for our kernels: each takes part, a fault comes out, a forked child does without."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distill.ops import openmp
from distill.ops.cpu import jit, spread

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


def test_every_thread_takes_part() -> None:
    run = openmp.team()
    assert run is not None
    meeting, seen = threading.Barrier(3, timeout=20), set()

    def work() -> None:
        meeting.wait()  # passes only when three are there at once
        seen.add(threading.get_ident())

    run(work, 3)
    assert len(seen) == 3 and threading.get_ident() in seen


def test_a_fault_on_any_thread_comes_out() -> None:
    run = openmp.team()
    assert run is not None
    caller = threading.get_ident()

    def work() -> None:
        if threading.get_ident() != caller:
            raise ZeroDivisionError("there")

    with pytest.raises(ZeroDivisionError, match="there"):
        run(work, 2)


def filled() -> Any:
    torch.set_num_threads(2)
    torch.ones(1 << 16).mul_(2)  # PyTorch's threads are there, and spin
    values = np.zeros(1000)
    spread(_fill, 1000, 1 << 30, values)
    return values


def _in_child(queue: Any) -> None:
    assert openmp.team() is None
    values = np.zeros(1000)
    spread(_fill, 1000, 1 << 30, values)
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
