"""The threads that PyTorch itself computes on, for our kernels too.

PyTorch's OpenMP threads spin for a while after each of its operators. Threads of our own have to share the cores with
them: on two cores a kernel that follows an operator then takes up to twice as long as with one thread. Run on the
spinning threads themselves it begins at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


Run = Callable[[Callable[[], None], int], None]
_forked = False


def team() -> Run | None:
    """``run(work, threads)``, which calls ``work()`` once on each of so many threads of PyTorch's OpenMP, the caller's
    among them, and returns when all have; None where PyTorch runs on something else than GNU's OpenMP, and in a forked
    child, which has OpenMP's state but not its threads, and would wait for them for ever.

    ``work`` must let go of the GIL for what is to run at once. What it raises on any thread is raised by ``run``.
    """
    return None if _forked else _team()


@functools.cache
def _team() -> Run | None:
    parallel = _parallel()
    if parallel is None:
        return None

    def run(work: Callable[[], None], threads: int) -> None:
        raised: list[BaseException] = []

        def body(_: Any) -> None:
            try:
                work()
            except BaseException as error:  # nothing can be raised through C: it is raised below
                raised.append(error)

        parallel(_BODY(body), None, threads, 0)
        if raised:
            raise raised[0]

    return run


def _parallel() -> Any:
    """``GOMP_parallel`` of the one GNU OpenMP in this process, if there is just one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    found = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    if len(found) != 1:
        return None
    parallel = ctypes.CDLL(found.pop()).GOMP_parallel
    parallel.argtypes, parallel.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def _forget() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
