"""Surgery: a hybrid from a teacher (or from a hybrid with fewer replaced blocks), weights kept where they stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.config import mixer_options
from distill.hybrid.model import FAMILIES
from distill.init import initialiser
from distill.mixers import ATTENTION
from distill.placement import replaced_blocks


def check_convertible(config: Any) -> str:
    """The family (model_type of the teacher) of a config; UserError where no hybrid can be made of it."""
    family = config.model_type.removeprefix("hybrid_")
    if family not in FAMILIES:
        raise UserError(f"architecture '{config.model_type}' cannot be converted; supported: {', '.join(FAMILIES)}")
    if getattr(config, "sliding_window", None) is not None:
        raise UserError(f"sliding-window attention (sliding_window={config.sliding_window}) cannot be converted")
    return str(family)


def hybrid_config(config: Any, mixers: Sequence[str], mixer: MixerConfig) -> Any:
    """The hybrid config of a teacher's (or hybrid's) config with this placement.

    Raises UserError for an architecture that cannot be converted, or a placement that does not fit.
    """
    family = check_convertible(config)
    keys = config.to_dict()
    for key in ("model_type", "architectures", "layer_types", "transformers_version"):
        keys.pop(key, None)
    keys |= {"mixers": list(mixers), "mixer_config": mixer_options(mixer), "use_cache": True}
    hybrid = FAMILIES[family][0](**keys)
    hybrid._attn_implementation = config._attn_implementation
    hybrid.check_mixers()
    return hybrid


def check_options(config: Any, mixer: MixerConfig) -> None:
    """Raise UserError where the mixers that a model has already are shaped otherwise than ``mixer`` says."""
    if not replaced_blocks(getattr(config, "mixers", None) or []):
        return
    wanted = mixer_options(mixer)
    for key, old in config.mixer_config.items():
        if key != "conv_init" and old != wanted[key]:
            raise UserError(f"mixer.{key}={wanted[key]}, but the mixers already there have {key}={old}")


def hybridize(model: Any, mixers: Sequence[str], mixer: MixerConfig, *, seed: int = 0) -> Any:
    """A hybrid with placement ``mixers`` from ``model`` (a teacher, or a hybrid with fewer blocks replaced).

    Blocks that newly lose attention are initialised by ``mixer.init`` from the attention that they had; all
    other weights are copied bit for bit, so that H1-0/L is the teacher. The new mixers depend on ``seed`` and
    the block alone: a block starts the same whichever others are swapped with it.

    Raises:
        UserError: an unsupported architecture, or a placement of another length or with a mixer changed back.
    """
    config = hybrid_config(model.config, mixers, mixer)
    before = getattr(model.config, "mixers", None) or [ATTENTION] * config.num_hidden_layers
    changed = [block for block, (old, new) in enumerate(zip(before, mixers, strict=True)) if old != new]
    for block in changed:
        if before[block] != ATTENTION:
            raise UserError(f"block {block} has mixer '{before[block]}' already; only attention can be replaced")
    check_options(model.config, mixer)
    _, model_class = FAMILIES[config.model_type.removeprefix("hybrid_")]
    with torch.random.fork_rng():
        hybrid = model_class(config).to(model.dtype)
    hybrid.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its frequencies stay in float32
    keep_fp32(hybrid)
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"model.layers.{block}.self_attn.") for block in changed)
    }
    missing, unexpected = hybrid.load_state_dict(kept, strict=False)
    new = tuple(f"model.layers.{block}.self_attn." for block in changed)
    assert not unexpected and all(name.startswith(new) for name in missing if name != "lm_head.weight"), missing
    hybrid.tie_weights()
    initialise = initialiser(mixer.init)
    for block in changed:
        attention: nn.Module = model.model.layers[block].self_attn
        target = hybrid.model.layers[block].self_attn
        with torch.random.fork_rng():
            torch.manual_seed(seed * 10_007 + block)
            target.reset_parameters()
            initialise(target, attention)
    hybrid.generation_config = copy.deepcopy(model.generation_config)
    return hybrid.to(model.device).train(model.training)


def keep_fp32(model: nn.Module) -> None:
    """A_log and D of every mixer back to float32, whatever the model was cast to."""
    for module in model.modules():
        if hasattr(module, "mil_slots"):
            for name in ("A_log", "D"):
                if hasattr(module, name):
                    parameter = getattr(module, name)
                    parameter.data = parameter.data.float()
