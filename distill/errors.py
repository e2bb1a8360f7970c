"""The one exception that a user's mistake ends in: a clear message, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: what was given, what is allowed, what to do. The CLI prints it and exits with 2."""


def brief(error: BaseException | str, limit: int = 240) -> str:
    """A library's message on one line, cut where it goes on for more than ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the GPU had no memory left; torch's CPU allocator says so in a plain RuntimeError."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text))
    )


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A hint such as ``" (did you mean 'mamba1'?)"``, or ``""`` where nothing allowed is near ``given``."""
    match = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def check_whole(what: str, value: object, least: int = 0) -> int:
    """``value`` if it is a whole number of at least ``least``; UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{what}={value!r} must be a whole number, at least {least}")
    return value


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return ``given`` if it is one of ``allowed``; otherwise raise a UserError that names them."""
    names = sorted(allowed)
    if given not in names:
        raise UserError(f"unknown {what} '{given}'{nearest(given, names)}; allowed: {', '.join(names)}")
    return given
