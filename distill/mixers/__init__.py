"""Token mixers that take the place of attention: one file each, whose name is the registered name.

A mixer is an ``nn.Module`` named ``Mixer`` with
``Mixer(config, layer_idx)``, where ``config`` is a hybrid config (teacher's keys and ``mixer_config``);
``forward(hidden_states [B, T, E], past_key_values, document_starts [B, T]) -> (output [B, T, E], None)``, under the
decorator ``padding_first``, by which padding may stand behind a text; ``mil_slots()``, the rows that MIL fills;
``reset_parameters()``; ``check(config)``, which raises a UserError for a shape that it cannot take; and ``operators``,
those of `distill.ops` whose kernels it chooses by its attribute ``kernels``; and ``ignores``, the options that mean
nothing to it. With ``step_weights()`` and ``through(hidden, carry, blocks)`` its decoding steps on CPU join those of
its neighbours in one compiled pass (`distill.ops.chain_cpu`). Weights of a child module are used in that module's own
forward, so that whatever brings them just before a call (offloading, ZeRO-3) does. ``attention`` is the teacher's own
mixer and has no file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from distill.config import MixerConfig
from distill.errors import UserError, choose
from distill.placement import ATTENTION

__all__ = ["ATTENTION", "available", "check_used", "mixer_class", "set_kernels"]

IGNORED = {
    "d_state": "its state is as wide as a head",
    "mil_layout": "every query head has states of its own, which meet the head's own keys and values",
}
"""Why a mixer has no use for an option."""


def available() -> list[str]:
    """Names of the mixers that can replace attention."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def mixer_class(name: str) -> Any:
    """The class registered under ``name``; its file is imported only now."""
    choose("mixer", name, available())
    return importlib.import_module(f"{__name__}.{name}").Mixer


def check_used(names: Iterable[str], options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that was set (not to its default) and that none of the mixers ``names`` reads."""
    classes = {name: mixer_class(name) for name in sorted(set(names) - {ATTENTION})}
    for key, value in options.items():
        unread = classes and all(key in mixer.ignores for mixer in classes.values())
        if unread and value != getattr(MixerConfig(), key):
            raise UserError(f"mixer.{key}={value} does nothing with {', '.join(classes)}: {IGNORED[key]}; leave it out")


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Choose the implementation for every mixer of a model: one of `distill.ops.kernels.CHOICES`, explained there."""
    for module in model.modules():
        if hasattr(module, "mil_slots"):
            setattr(module, "kernels", kernels)  # noqa: B010
