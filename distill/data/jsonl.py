"""JSONL files: every row parsed by a function of the caller's, a malformed one named by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import UserError

Parsed = TypeVar("Parsed")


def read_rows(path: Path, parse: Callable[[Any], Parsed]) -> list[tuple[int, Parsed]]:
    """(line number from 1, ``parse(row)``) of every row of a file; empty lines are skipped.

    Raises UserError where the file cannot be read, and ``FILE:LINE: ...`` where a line is not JSON or ``parse``
    raises a UserError of its own.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    parsed = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed.append((number, parse(json.loads(line))))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from error
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    return parsed
