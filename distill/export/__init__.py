"""Export: a hybrid in a form that other people's programs load without our code; one file each, named after the form.

A form has ``obstacles(config)``, why a hybrid with this config cannot be held (empty where it can), and
``export(checkpoint, output)``, which writes it whole or not at all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError, choose
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import is_hybrid
from distill.mixers import ATTENTION
from distill.mixers import available as mixers

__all__ = ["available", "obstacles", "support_table", "target"]


def available() -> list[str]:
    """Names of the forms, as ``--to`` takes them."""
    helpers = ("granite", "gguf_", "imatrix", "quantize")
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith(helpers))


def target(name: str) -> Any:
    """The module of the form ``name``; UserError for one that there is not."""
    return importlib.import_module(f"{__name__}.{choose('target', name, available()).replace('-', '_')}")


def obstacles(config: Any, name: str) -> list[str]:
    """Why a model with this config cannot be exported to ``name``; empty where it can."""
    if not is_hybrid(config):
        return [f"a '{config.model_type}' model is no hybrid of ours; other tools load it as it is"]
    return list(target(name).obstacles(config))


def check(config: Any, name: str, what: str | Path) -> None:
    """Raise UserError where ``obstacles`` finds any: why, and what would work."""
    if found := obstacles(config, name):
        raise UserError(f"{what} cannot be exported to {name}: {'; '.join(found)}")


def support_table() -> list[dict[str, str]]:
    """Teacher family x mixer x form -> ``exact``, or ``no`` with the reason; of each family a model as its authors
    publish it: biases and norms where it has them, as many heads as fit its width."""
    rows = []
    for family, (hybrid, _) in FAMILIES.items():
        for mixer in mixers():
            shape: Mapping[str, Any] = {
                "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 64,
            }  # fmt: skip
            config = hybrid(**shape, mixers=[mixer, ATTENTION, mixer, ATTENTION])
            row = {"teacher": family, "mixer": mixer}
            for name in available():
                found = obstacles(config, name)
                row[name] = f"no: {'; '.join(found)}" if found else "exact"
            rows.append(row)
    return rows
