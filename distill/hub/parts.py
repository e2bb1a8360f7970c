"""A module of ours cut into its top-level statements, so that those which some names do not need can be left out."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PLAIN = ("dataclass", "cache", "contextmanager", "no_grad", "once_differentiable")
"""Decorators that do nothing but decorate: what has one can be left out."""


@dataclass
class Part:
    """A statement at the top level of a module, with the comment before it and the docstring after it."""

    node: ast.stmt
    first: int
    last: int
    """Lines of the source, from 0, ``last`` not included."""
    binds: frozenset[str]
    uses: frozenset[str]
    acts: bool
    """Whether it does something besides binding names, so that it cannot be left out."""


class Module:
    """A module of ours, read and cut into parts.

    Raises ValueError for what cannot be copied: ``import distill.x``, or a computed import of another form.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.is_package = name, path.name == "__init__.py"
        self.text = path.read_bytes()
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0, *itertools.accumulate(len(line) for line in self.lines)]
        body = ast.parse(self.text).body
        self.head = body.pop(0).end_lineno or 0 if body and _is_text(body[0]) else 0
        self.parts: list[Part] = []
        for node in body:
            end = node.end_lineno or node.lineno
            if _is_text(node) and self.parts:
                self.parts[-1].last = end
                continue
            first = self.parts[-1].last if self.parts else self.head
            self.parts.append(Part(node, first, end, frozenset(_bound(node)), frozenset(_used(node)), _acts(node)))

    def needed(self, names: Iterable[str] | None) -> list[Part]:
        """The parts that ``names`` need (None: all parts)."""
        if names is None:
            return self.parts
        if missing := set(names) - {name for part in self.parts for name in part.binds}:
            raise ValueError(f"{self.name} has no {', '.join(sorted(missing))}")
        chosen = {id(part) for part in self.parts if part.acts}
        wanted = {*names, *(name for part in self.parts if part.acts for name in part.uses)}
        seen: set[str] = set()
        while new := wanted - seen:
            seen |= new
            for part in self.parts:
                if part.binds & new:
                    chosen.add(id(part))
                    wanted |= part.uses
        return [part for part in self.parts if id(part) in chosen]

    def base(self, node: ast.ImportFrom) -> str:
        """What a ``from ... import`` imports from, in full."""
        parts = self.name.split(".")
        up = parts[: len(parts) - node.level + self.is_package] if node.level else []
        return ".".join([*up, *([node.module] if node.module else [])])

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Where a node stands in the source, in bytes."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = self.starts[node.lineno - 1] + node.col_offset
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement of the top level binds there."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from _bound(child)
            else:
                yield from (each.id for each in ast.walk(child) if isinstance(each, ast.Name) and _stored(each))


def _stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _used(node: ast.stmt) -> Iterator[str]:
    yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and not _stored(each))


def _acts(node: ast.stmt) -> bool:
    """Whether a statement may do more than bind names: a call by itself, a decorator that is not plain."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return True
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        calls = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
        return any(getattr(each, "attr", getattr(each, "id", "")) not in PLAIN for each in calls)
    return not _is_import(node) and not isinstance(node, (ast.Assign, ast.AnnAssign))
