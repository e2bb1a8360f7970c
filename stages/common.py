"""What every verb needs: finding configs, threads."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import torch

from distill.errors import UserError, nearest


def shipped_configs() -> dict[str, Path]:
    """Short name -> path of the configs that we ship."""
    folder = Path(str(resources.files("configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(target: str) -> Path:
    """The file that CONFIG names: a path, or the short name of one we ship."""
    shipped = shipped_configs()
    if target in shipped:
        return shipped[target]
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if path.name in {p.name for p in shipped.values()} and path.parent.name == "configs":
        return shipped[path.stem]  # configs/x.yaml named from outside the checkout
    raise UserError(f"no config '{target}'{nearest(target, shipped)}: give a YAML file or one of {', '.join(shipped)}")


def set_threads(threads: int) -> int:
    """Fix the number of CPU threads (0: one a core); returns it."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count
