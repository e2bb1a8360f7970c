"""SIGTERM, SIGINT and SIGUSR1: a training finishes its step and writes a checkpoint, all else stops at once.

SIGUSR1 is a scheduler's: it asks for the same, but for the exit code that says "run me again".
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AGAIN = 75
"""Exit code (EX_TEMPFAIL) after SIGUSR1: what was done is kept, and the same command continues."""
LOST = 76
"""Exit code (EX_PROTOCOL) of a job that lost one of its processes: the same command continues."""
echo = 0.0
"""Seconds within which further signals are echoes of one: a job of several processes gets a scheduler's signal from it
and once more from its launcher."""
_asked: int | None = None
_since = 0.0
_deferred = _silent = False


class Stopped(KeyboardInterrupt):
    """Raised where a signal asked to stop; ``signum`` says which, ``exit_code`` what the process ends with."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = exit_code(signum)


def exit_code(signum: int) -> int:
    """What a process that a signal stopped ends with: 128 + the signal, or ``AGAIN``."""
    return AGAIN if signum == signal.SIGUSR1 else 128 + signum


def _handle(signum: int, frame: Any) -> None:
    global _asked, _since
    if _asked is not None:
        if signum == signal.SIGUSR1 or time.monotonic() < _since + echo:
            return
        os._exit(128 + signum)
    _asked, _since = signum, time.monotonic()
    if not _deferred:
        raise Stopped(signum)
    if _silent:
        return
    # print would not do here: the signal may have come while one was under way
    name = signal.Signals(signum).name
    os.write(2, f"\n{name}: finishing this step and writing a checkpoint; once more stops at once\n".encode())


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals within; a second one (but SIGUSR1) ends the process at once.

    Without effect outside the main thread.
    """
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
def deferred(*, for_another: bool = False) -> Iterator[None]:
    """Within, a first signal only makes ``asked`` true; on leaving without an error it is raised as Stopped, unless it
    is ``for_another`` process to heed it."""
    global _deferred, _silent
    before, _deferred, _silent = (_deferred, _silent), True, for_another
    try:
        yield
    finally:
        _deferred, _silent = before
    if _asked is not None and not for_another:
        raise Stopped(_asked)


def spare(initialise: Callable[[int], None] | None, number: int) -> None:
    """Begin process ``number`` of those that prepare a training's rows, such that it outlives the signal that asks the
    training for a checkpoint: launchers, schedulers and terminals send that to it, too. A second SIGTERM ends it, as is
    done with those that are left at the end; ``initialise(number)`` is what else is to be done."""
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
    for other in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(other, signal.SIG_IGN)
    if initialise is not None:
        initialise(number)


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return _asked is not None


def number() -> int:
    """The signal that has asked to stop; 0 for none."""
    return _asked or 0


def agree(signum: int) -> None:
    """Take it that ``signum`` has asked to stop, as it has asked another process of the job."""
    global _asked
    _asked = _asked or signum
