"""SIGTERM, SIGINT and SIGUSR1: a training finishes its step and writes a checkpoint, all else stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_asked: int | None = None
_deferred = False


class Stopped(KeyboardInterrupt):
    """Raised where a signal asked to stop; ``signum`` says which, the exit code is 128 + that."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _handle(signum: int, frame: Any) -> None:
    global _asked
    if _asked is not None and signum == signal.SIGUSR1:  # a scheduler's, which may come in many ways at once
        return
    if _asked is not None:
        os._exit(128 + signum)
    _asked = signum
    if not _deferred:
        raise Stopped(signum)
    # print would not do here: the signal may have come while one was under way
    name = signal.Signals(signum).name
    os.write(2, f"\n{name}: finishing this step and writing a checkpoint; once more stops at once\n".encode())


@contextmanager
def handled() -> Iterator[None]:
    """Handle both signals within; a second one ends the process at once. Without effect outside the main thread."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _asked = None
    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:  # as under nohup, or in a shell's background
                signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a first signal only makes ``asked`` true; on leaving without an error it is raised as Stopped."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _asked is not None:
        raise Stopped(_asked)


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return _asked is not None
