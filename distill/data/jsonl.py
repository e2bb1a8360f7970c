"""JSONL files: every row parsed by a function of the caller's, a malformed one named by file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from distill.errors import UserError

Parsed = TypeVar("Parsed")
UNREADABLE = (OSError, UnicodeDecodeError, EOFError, zlib.error)
"""What a file that cannot be read, is not UTF-8, or is gzipped and torn raises."""


def open_text(path: Path, newline: str | None = "\n") -> IO[str]:
    """A text file, gzipped or not, a byte order mark dropped."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def iterate_rows(path: Path, parse: Callable[[Any], Parsed]) -> Iterator[tuple[int, Parsed]]:
    """(line number from 1, ``parse(row)``) of every row of a file, read line by line; empty lines are skipped.

    Raises UserError where the file cannot be read, and ``FILE:LINE: ...`` where a line is not JSON or ``parse``
    raises a UserError of its own.
    """
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = parse(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from error
                except UserError as error:
                    raise UserError(f"{path}:{number}: {error}") from error
                yield number, row
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_rows(path: Path, parse: Callable[[Any], Parsed]) -> list[tuple[int, Parsed]]:
    """Every row of a file at once: see ``iterate_rows``."""
    return list(iterate_rows(path, parse))
