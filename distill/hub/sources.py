"""Our own sources as a flat folder of files that need none of our packages: what some names need, imports rewritten.

transformers runs the code that comes with a model from files of one folder which import each other relatively
(``from .name import thing``); it knows no packages. So ``distill/ops/ssd.py`` becomes ``distill_ops_ssd.py``. Imports
are followed, those by a computed name (``import_module(f"distill.ops.{operator}_{kernel}")``) too.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.hub.parts import Module, Part

PACKAGE = "distill"
ROOT = Path(__file__).resolve().parents[1]
REQUIRED = frozenset({"torch", "transformers", "numpy", *sys.stdlib_module_names})
"""What a copy may count on. Anything else is imported within ``try``, where transformers does not ask for it."""
Bytes = tuple[int, int, str]
"""Begin, end and new text of a stretch of a source."""


def flat(module: str) -> str:
    """``distill.ops.ssd`` -> ``distill_ops_ssd``."""
    return module.replace(".", "_")


class Copy:
    """The files that the ``names`` of a module need, and what of each.

    Args:
        texts: what a computed part of a name may be, besides the texts in the sources that are copied (the mixers
            that a model has).
        root: the package's folder.

    Raises ValueError for an import that cannot be followed.
    """

    def __init__(self, module: str, names: Iterable[str], texts: Iterable[str] = (), root: Path = ROOT) -> None:
        self.paths = {}
        for path in sorted(root.rglob("*.py")):
            parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
            self.paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self.names: dict[str, set[str] | None] = {module: set(names)}
        self.texts, self.by_name = set(texts), dict[str, set[str]]()
        before = None
        while before != (before := self._state()):
            for name in list(self.names):
                self._follow(name)

    def files(self) -> dict[str, str]:
        """File name -> text."""
        return {f"{flat(name)}.py": self._render(name) for name in sorted(self.names)}

    def _state(self) -> Any:
        """What following imports adds to, so that its end shows."""
        wanted = {name: None if names is None else len(names) for name, names in self.names.items()}
        return wanted, len(self.texts), {name: len(found) for name, found in self.by_name.items()}

    def module(self, name: str) -> Module:
        return _module(name, self.paths[name])

    def parts(self, name: str) -> list[Part]:
        return self.module(name).needed(self.names[name])

    def _follow(self, name: str) -> None:
        """Note what the parts of a module that are needed import."""
        module, parts = self.module(name), self.parts(name)
        used = {each for part in parts for each in part.uses}
        wanted = self.names[name]
        for part in parts:
            for node in ast.walk(part.node):
                if isinstance(node, ast.ImportFrom) and module.base(node).split(".")[0] == PACKAGE:
                    for alias in node.names:
                        bound = alias.asname or alias.name
                        if node is not part.node or wanted is None or bound in used | wanted:
                            self._want(name, module.base(node), alias.name)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                    self.texts.add(node.value)
        for part in parts:
            for call in _calls(part.node, "import_module"):
                if (pieces := computed(module, call)) is not None:
                    found = matching(pieces, self.texts, self.paths)
                    self.by_name.setdefault(name, set()).update(found)
                    self.names |= dict.fromkeys(found)

    def _want(self, importer: str, base: str, name: str) -> None:
        if (inner := f"{base}.{name}") in self.paths:
            self.names[inner] = None
            self.by_name.setdefault(importer, set()).add(inner)
        elif (names := self.names.setdefault(base, set())) is not None:
            names.add(name)

    def _render(self, name: str) -> str:
        module, parts, wanted = self.module(name), self.parts(name), self.names[name]
        used = {each for part in parts for each in part.uses} | (wanted or set())
        source = f"{name.replace('.', '/')}{'/__init__' if module.is_package else ''}.py"
        pieces = [f"# Copied from {source} by distill, which is where to change it.\n".encode()]
        pieces += module.lines[: module.head]
        for part in parts:
            begin, end = module.starts[part.first], module.starts[part.last]
            keep: Callable[[str], bool] = (lambda each: each in used) if wanted is not None else (lambda each: True)
            edits = [
                edit for node in ast.walk(part.node) for edit in self._edits(module, node, node is part.node, keep)
            ]
            text = module.text[begin:end]
            for first, last, new in sorted(edits, reverse=True):
                text = text[: first - begin] + new.encode() + text[last - begin :]
            pieces.append(text)
        if found := self.by_name.get(name):
            # transformers copies what stands in lines of the form "from .x import y", and nothing else.
            pieces.append(
                b"\nif False:  # never run: files that are imported in other ways, for what copies this code\n"
            )
            pieces += [f"    from .{flat(each)} import *\n".encode() for each in sorted(found)]
        result = b"".join(pieces).decode()
        compile(result, f"{flat(name)}.py", "exec")
        return result

    def _edits(self, module: Module, node: ast.AST, top: bool, keep: Callable[[str], bool]) -> Iterator[Bytes]:
        """What has to change in a node for it to stand in a flat folder."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias for alias in node.names if not top or keep((alias.asname or alias.name).split(".")[0])]
            if getattr(node, "module", "") != "__future__":
                yield *module.span(node), self._import(module, node, names)
        elif isinstance(node, ast.Expr) and list(_calls(node.value, "register")) and "Auto" in ast.unparse(node):
            # Of a model that brings its code transformers tells the Auto classes itself; were they told here, the
            # first folder's code would serve every other folder's model.
            yield *module.span(node), "pass"
        elif isinstance(node, ast.Call) and list(_calls(node, "import_module"))[:1] == [node]:
            if (pieces := computed(module, node)) is not None:
                yield *module.span(node), f'importlib.import_module(f".{flat("".join(pieces))}", __package__)'
        elif isinstance(node, ast.Call) and ast.unparse(node) == "pkgutil.iter_modules(__path__)":
            own = [name.rpartition(".")[2] for name in self.names if name.rpartition(".")[0] == module.name]
            infos = ", ".join(f'pkgutil.ModuleInfo(None, "{name}", False)' for name in sorted(own))
            yield *module.span(node), f"[{infos}]"

    def _import(self, module: Module, node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> str:
        """An import statement that imports ``names`` from where they are in the flat folder."""
        indent = " " * node.col_offset
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE for alias in names):
                raise ValueError(f"{module.name}: write 'from {PACKAGE}.x import y' where '{ast.unparse(node)}' stands")
            own, lines = False, [f"import {_named(alias)}" for alias in names]
            top = {alias.name.split(".")[0] for alias in names}
        else:
            base = module.base(node)
            own, top = base.split(".")[0] == PACKAGE, {base.split(".")[0]}
            inner = [alias for alias in names if own and f"{base}.{alias.name}" in self.paths]
            plain = ", ".join(_named(alias) for alias in names if alias not in inner)
            lines = [f"from {f'.{flat(base)}' if own else base} import {plain}"] if plain else []
            lines += [f"from . import {flat(f'{base}.{each.name}')} as {each.asname or each.name}" for each in inner]
        if own or top <= REQUIRED or not lines:
            return f"\n{indent}".join(lines) or "pass"
        tried = f"\n{indent}    ".join(lines)
        head, tail = "try:  # optional: whether it is there is asked before", "except ImportError:"
        return f"{head}\n{indent}    {tried}\n{indent}{tail}\n{indent}    raise"


@functools.cache
def _module(name: str, path: Path) -> Module:
    return Module(name, path)


def _named(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _calls(node: ast.AST, function: str) -> Iterator[ast.Call]:
    """Calls of a function of this name at or below a node."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and getattr(each.func, "attr", getattr(each.func, "id", "")) == function:
            yield each


def computed(module: Module, call: ast.Call) -> list[str] | None:
    """The name that ``import_module`` is given, as pieces of text of which those in braces are computed; None for a
    module of another package.

    Raises ValueError for a name in another form.
    """
    pieces: list[str] = []
    for value in call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else call.args[:1]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            pieces.append(value.value)
        elif isinstance(value, ast.FormattedValue):
            name = ast.unparse(value.value)
            pieces.append(module.name if name == "__name__" else f"{{{name}}}")
        else:
            raise ValueError(f"{module.name}: cannot follow {ast.unparse(call)}; write the name as an f-string")
    return pieces if "".join(pieces).split(".")[0] == PACKAGE else None


def matching(pieces: list[str], texts: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of ``names`` that the pieces give with one of ``texts`` in each place that is computed."""
    any_text = f"(?:{'|'.join(map(re.escape, sorted(texts)))})"
    pattern = "".join(any_text if re.fullmatch(r"\{.*\}", piece) else re.escape(piece) for piece in pieces)
    return {name for name in names if re.fullmatch(pattern, name)}
