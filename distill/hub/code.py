"""The code that a hybrid needs to be loaded where our package is not installed (``trust_remote_code=True``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from distill.hub.sources import Copy, flat
from distill.hybrid import model as hybrids

ENTRY = "modeling_hybrid"
"""The file that ``auto_map`` names."""


def auto_map(family: str) -> dict[str, str]:
    """The key of config.json that says where a hybrid's classes are."""
    config, model = hybrids.FAMILIES[family]
    return {"AutoConfig": f"{ENTRY}.{config.__name__}", "AutoModelForCausalLM": f"{ENTRY}.{model.__name__}"}


def code_files(family: str, mixers: Sequence[str]) -> dict[str, str]:
    """File name -> text of everything that hybrids of a ``family`` with these ``mixers`` run, from our own sources.

    Kernels are chosen as in our package: the compiled ones where numba is installed, else plain PyTorch.
    """
    config, model = (each.__name__ for each in hybrids.FAMILIES[family])
    entry = f'''"""{model}: a {family} model some of whose attention layers are replaced by state-space mixers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from .{flat(hybrids.__name__)} import FAMILIES

{config}, {model} = FAMILIES["{family}"]
{config}.__module__ = {model}.__module__ = __name__  # the file that is saved with a model, and all that it imports
'''
    return {f"{ENTRY}.py": entry, **_copied(frozenset(mixers))}


@functools.cache
def _copied(mixers: frozenset[str]) -> dict[str, str]:
    return Copy(hybrids.__name__, ["FAMILIES"], mixers).files()
