"""Groups of parameters: what is trained, at which learning rate, and what decays.

`mixers` are all parameters of replaced mixers, `embeddings` the token embedding and the LM head, `norms` the norms
outside of mixers, `body` the rest (attention and MLPs). None of A_log, D, dt's bias, other biases, norms and embeddings
decays, whatever group it is in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from distill.config import TrainConfig
from distill.errors import UserError, choose

GROUPS = ("mixers", "body", "embeddings", "norms")
NO_DECAY = re.compile(r"A_log|\.D$|dt_bias|bias|norm|embed_tokens|lm_head")
"""A parameter whose name matches gets no weight decay."""


def check_groups(train: TrainConfig) -> None:
    """Raise UserError for groups that are not there, a rate given twice, and where nothing would be trained."""
    for name in (*train.learning_rates, *train.freeze):
        choose("group of parameters", name, GROUPS)
    for name, rate in train.learning_rates.items():
        if not 0 <= rate < float("inf"):
            raise UserError(f"train.learning_rates.{name}={rate} must be at least 0")
        if name in train.freeze:
            raise UserError(f"train.learning_rates names {name}, which train.freeze leaves untrained: set one of them")
    if train.mixer_learning_rate and "mixers" in train.learning_rates:
        raise UserError(
            f"train.mixer_learning_rate={train.mixer_learning_rate} and train.learning_rates.mixers="
            f"{train.learning_rates['mixers']} say the same thing: set one of them"
        )
    if set(train.freeze) >= set(GROUPS):
        raise UserError(f"train.freeze={list(train.freeze)} leaves nothing to train: take a group out")


def rates_of(train: TrainConfig) -> dict[str, float]:
    """The learning rates of the groups that have their own."""
    mixers = {"mixers": train.mixer_learning_rate} if train.mixer_learning_rate else {}
    return {**mixers, **train.learning_rates}


def group_of(model: nn.Module) -> dict[str, str]:
    """The group of every parameter, by its name."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "mil_slots"))
    found = {}
    for name, _ in model.named_parameters():
        if name.startswith(prefixes):
            found[name] = "mixers"
        elif "embed_tokens" in name or "lm_head" in name:
            found[name] = "embeddings"
        else:
            found[name] = "norms" if re.search(r"norm", name) else "body"
    return found


def freeze(model: nn.Module, groups: list[str]) -> None:
    """Leave the parameters of ``groups`` as they are; UserError where no other has parameters."""
    if not groups:
        return
    names = group_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and names[name] not in groups)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"train.freeze={groups} leaves nothing of this model to train: take a group out")


def split_by_rate(optimizer: Any, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Put the parameters of each group with a rate of its own into groups of the optimizer's, by what decays."""
    names = group_of(model)
    for group, rate in rates.items():
        ours = {id(parameter) for name, parameter in model.named_parameters() if names[name] == group}
        for old in [old for old in optimizer.param_groups if any(id(p) in ours for p in old["params"])]:
            mine = [parameter for parameter in old["params"] if id(parameter) in ours]
            old["params"] = [parameter for parameter in old["params"] if id(parameter) not in ours]
            optimizer.add_param_group({**old, "params": mine, "lr": rate})


def describe_groups(model: nn.Module, train: TrainConfig) -> list[str]:
    """A table: every group, its parameters, how many of them are trained, at which rate, how many decay."""
    rates, names = rates_of(train), group_of(model)
    lines = [f"{'group':12s}{'parameters':>15s}{'trained':>15s}{'rate':>10s}{'decay':>8s}{'that decay':>15s}"]
    for group in GROUPS:
        members = [(name, p) for name, p in model.named_parameters() if names[name] == group]
        # of a parameter that ZeRO-3 keeps in parts, the size of the whole
        size = lambda of: sum(getattr(p, "ds_numel", p.numel()) for _, p in of)  # noqa: E731
        trained = [(name, p) for name, p in members if p.requires_grad]
        decaying = [(name, p) for name, p in trained if not NO_DECAY.search(name)]
        if not members:
            continue
        rate = f"{rates.get(group, train.learning_rate):g}" if trained else "-"
        decay = f"{train.weight_decay:g}" if decaying else "-"
        decays = size(decaying) if train.weight_decay else 0
        lines.append(f"{group:12s}{size(members):15,d}{size(trained):15,d}{rate:>10s}{decay:>8s}{decays:15,d}")
    return lines
