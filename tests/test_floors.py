"""Imports go only to a lower floor, and never in a circle; the checker is tried on trees that break the rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("distill", "eval", "stages")
STAGES = "pretrain traces show plan score place swap cache train measure sft merge package bench report quantize cancel"

# Lowest floor first. A name stands for a module; "name.*" for everything below it.
# A package's __init__ is named by itself: distill/__init__.py is the public interface, on the floor of what it names.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "distill.errors",
        "distill.config",
        "distill.config.*",
        "distill.config_merge",
        "distill.placement",
        "distill.schedule",
        "distill.records",
        "distill.storage",
        "distill.checkpoints",
        "distill.interrupt",
        "distill.launch",
        "distill.distributed",
        "distill.groups",
        "distill.engine",
        "distill.progress",
        "distill.universal",
        "distill.lock",
        "distill.machine",
        "distill.tracking",
        "distill.weights",
    ),  # F0
    (
        "distill.ops",
        "distill.ops.*",
        "distill.mixers",
        "distill.mixers.*",
        "distill.losses",
        "distill.head_loss",
        "distill.loss_chunks",
        "distill.stored_logits",
        "distill.data",
        "distill.data.*",
    ),
    ("distill.init", "distill.init.*"),  # F2
    ("distill.hybrid", "distill.hybrid.*"),
    (
        "distill.teacher",
        "distill.likelihood",
        "distill.lm_eval",
        "distill.offline",
        "distill.offload",
        "distill.guards",
        "distill.sharded",
        "distill.footprint",
    ),
    ("distill.trainer",),  # F5
    (
        "distill.importance",
        "distill.importance.*",
        "distill.posttrain",
        "distill.posttrain.*",
        "distill.hub",
        "distill.hub.*",
        "distill.export",
        "distill.export.*",
        "distill.scoring",
        "distill.api",
        "distill",
    ),
    (
        "eval",
        "eval.backends",
        "eval.backends.*",
        "eval.wellformed",
        "eval.machine",
        "eval.roofline",
        "eval.answers",
        "eval.decoding",
        "eval.lm",
        "eval.local_data",
        "eval.scores",
        "eval.suites",
    ),
    (
        "eval.accuracy",
        "eval.loglikelihood",
        "eval.throughput",
        "eval.serving",
        "eval.shapes",
        "eval.runs",
        "eval.pareto",
        "eval.frames",
        "eval.provenance",
        "eval.external",
        "eval.drawing",
        "eval.page",
        "eval.words",
        "eval.captions",
        "eval.speeds",
        "eval.tasks",
        "eval.tasks.*",
    ),  # F8
    (
        "eval.figures",
        "eval.figures.*",
        "eval.distance",
        "eval.tables",
        "eval.plots",
        "eval.summary",
        "eval.markdown",
        "eval.pages",
        "eval.compare",
        "eval.report",
    ),
    (
        "stages",
        "stages.candidates",
        "stages.common",
        "stages.context",
        "stages.failures",
        "stages.identity",
        "stages.jobs",
        "stages.ledger",
        "stages.lineage",
        "stages.ranks",
        "stages.slurm",
        "stages.speedup",
        "stages.targets",
        "stages.options",
        "stages.checkpoints",
        "stages.gguf_files",
        "stages.training",
    ),  # F10: shared, verbs, submit
    tuple(f"stages.{verb}" for verb in STAGES.split()),
    ("stages.submit", "stages.export", "stages.import_native"),
    ("stages.submit", "stages.status"),
    ("stages.pipeline",),  # F11
    ("stages.cli",),
)


def floor(module: str) -> int | None:
    """The floor of a module, or None where the table does not know it."""
    for number, names in enumerate(FLOORS):
        if module in names or any(f"{module.rpartition('.')[0]}.*" == name for name in names):
            return number
    return None


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def named(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """(what, where from) of every import, wherever it stands: ``from a import b`` gives ("a.b", "a")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", base) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            for text in [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]:
                yield text.rstrip("."), text.rstrip(".")


def read_imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, lazily or not."""
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[module] = set()
        for what, base in named(tree, module, path.name == "__init__.py"):
            target = what if what in modules else base
            if target.split(".")[0] in PACKAGES:
                graph[module].add(target)
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, its first module repeated at the end; [] where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(graph.get(module, ())):
            if circle := visit(target, [*path, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


def violations(root: Path) -> list[str]:
    """Every way in which the imports under ``root`` break the rules."""
    modules = find_modules(root)
    graph = read_imports(modules)
    found = [f"{module} is on no floor: add it to FLOORS" for module in modules if floor(module) is None]
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = floor(module), floor(target)
            if target not in modules:
                found.append(f"{module} imports {target}, which does not exist")
            elif module.split(".")[0] == "distill" and target.split(".")[0] != "distill":
                found.append(f"{module} imports {target}: distill/ knows neither eval/ nor stages/")
            elif here is not None and there is not None and there > here:
                found.append(f"{module} (floor {here}) imports {target} (floor {there})")
    circle = find_circle(graph)
    return [*found, f"circle: {' -> '.join(circle)}"] if circle else found


def test_imports_go_down_and_not_in_circles() -> None:
    assert len(find_modules(ROOT)) > 30, "the packages were not found"
    assert violations(ROOT) == []


def test_eval_is_never_imported_by_its_bare_name() -> None:
    """``import eval`` (or ``import eval.x``) would hide the builtin."""
    for path in find_modules(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bare = [a.name for a in node.names if a.asname is None and a.name.split(".")[0] == "eval"]
                assert not bare, f"{path.name}:{node.lineno}: write 'from {bare[0]} import ...'"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that keeps the rules."""
    sources = {
        "distill/__init__.py": "from distill.hybrid import model\n",
        "distill/errors.py": "import difflib\n",
        "distill/config.py": "from distill.errors import UserError\n",
        "distill/hybrid/__init__.py": "",
        "distill/hybrid/model.py": "from ..errors import UserError\n",
        "distill/hybrid/config.py": "from . import model\nfrom .model import thing\n",
        "distill/teacher.py": "import distill.hybrid.config\n",
        "eval/__init__.py": "import distill\n",
        "eval/pareto.py": "import pandas\n",
        "eval/report.py": "from eval import pareto\n",
        "stages/__init__.py": "",
        "stages/common.py": "import torch\n",
        "stages/plan.py": "from stages.common import check\n",
        "stages/submit.py": "from stages import plan\n",
        "stages/pipeline.py": "from stages import plan, submit\nfrom eval.report import table\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []
    return tmp_path


CIRCLE = "circle: distill.hybrid.model -> distill.hybrid.config -> distill.hybrid.model"


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("distill/errors.py", "from distill.teacher import Teacher", ["distill.errors (floor 0)", "circle: "]),
        ("distill/hybrid/config.py", "import distill.teacher", ["(floor 3) imports distill.teacher (floor 4)"]),
        ("distill/hybrid/config.py", "from ..teacher import Teacher", ["(floor 3) imports distill.teacher (floor 4)"]),
        ("distill/hybrid/config.py", "from .. import teacher", ["(floor 3) imports distill.teacher (floor 4)"]),
        ("distill/hybrid/__init__.py", "from ..teacher import x", ["distill.hybrid (floor 3) imports distill.teacher"]),
        ("distill/hybrid/model.py", "def f():\n    from distill import teacher", ["imports distill.teacher (floor 4)"]),
        ("distill/hybrid/model.py", "if TYPE_CHECKING:\n    import distill.teacher", ["imports distill.teacher"]),
        ("distill/hybrid/model.py", "x = importlib.import_module('distill.teacher')", ["imports distill.teacher"]),
        (
            "distill/hybrid/model.py",
            "from distill.hybrid.config import x",
            [CIRCLE],
        ),
        (
            "distill/hybrid/model.py",
            "def f():\n    from .config import x",
            [CIRCLE],
        ),
        ("distill/teacher.py", "from eval.pareto import x", ["distill/ knows neither eval/ nor stages/"]),
        ("distill/teacher.py", "def f():\n    from stages import common", ["distill/ knows neither eval/ nor stages/"]),
        ("distill/config.py", "from distill.erors import UserError", ["imports distill.erors, which does not exist"]),
        ("eval/pareto.py", "from eval import report", ["eval.pareto (floor 8) imports eval.report", "circle: "]),
        ("eval/report.py", "from stages.common import say", ["eval.report (floor 9) imports stages.common"]),
        ("stages/common.py", "from stages import plan", ["stages.common (floor 10) imports stages.plan", "circle: "]),
        ("stages/plan.py", "from stages.submit import x", ["stages.plan (floor 11) imports stages.submit", "circle: "]),
        ("distill/novelty.py", "import json", ["distill.novelty is on no floor"]),
        ("distill/novelty/part.py", "import json", ["distill.novelty.part is on no floor"]),
        ("eval/errors.py", "import json", ["eval.errors is on no floor"]),
    ],
)
def test_a_violation_is_found(tree: Path, file: str, line: str, expected: list[str]) -> None:
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    found = violations(tree)
    for part in expected:
        assert any(part in message for message in found), found
    assert len([m for m in found if not m.startswith("circle")]) <= 1, "nothing is reported that is not so"
