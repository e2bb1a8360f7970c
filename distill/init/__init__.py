"""How a new mixer starts: one file each, whose name is the registered name.

Each has ``initialise(mixer, attention) -> None``, which fills the mixer in place.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from distill.errors import choose


def available() -> list[str]:
    """Names of the initialisations."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def initialiser(name: str) -> Callable[[Any, Any], None]:
    """The ``initialise`` function registered under ``name``."""
    choose("mixer.init", name, available())
    function: Callable[[Any, Any], None] = importlib.import_module(f"{__name__}.{name}").initialise
    return function
