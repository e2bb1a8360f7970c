"""Surgery: a hybrid from a teacher (or from a hybrid with fewer replaced blocks), weights kept where they stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.config import HybridConfigMixin, mixer_options
from distill.hybrid.model import FAMILIES
from distill.init import initialiser
from distill.mixers import ATTENTION, mixer_class
from distill.placement import replace, replaced_blocks

ENCODERS = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


def obstacles(config: Any) -> list[str]:
    """Why no hybrid can be made of a model with this (transformers) config: its traits that surgery knows no way
    around; empty where there are none."""
    if config.is_encoder_decoder:
        return ["an encoder-decoder, whose attention also looks at an encoder"]
    text = config.get_text_config()
    if text.is_heterogeneous:  # and most keys cannot be asked for
        return ["blocks that differ from each other (per_layer_config)"]
    given = lambda *names: next((name for name in names if getattr(text, name, None)), None)  # noqa: E731
    layers = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    found = []
    if text is not config:
        found.append("a multimodal model, whose language model reads more than text")
    if config.model_type in STATE_SPACE:
        found.append("a pure state-space model, which has no attention to replace")
    elif layers & {"linear_attention", "hybrid", "hybrid_sliding", "conv"} and not is_hybrid(config):
        found.append("a hybrid already, some of whose blocks have no plain attention")
    if config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        found.append("an encoder, whose attention looks both ways and which generates nothing")
    if given("kv_lora_rank"):
        found.append("multi-head latent attention (MLA), which has no key and value projections to start from")
    if experts := given("num_local_experts", "num_experts", "n_routed_experts"):
        found.append(f"a mixture of experts (MoE, {experts}={getattr(text, experts)})")
    everywhere = window is not None and not hasattr(text, "use_sliding_window")  # no key says which blocks have it
    if everywhere or layers & {"sliding_attention", "chunked_attention"}:
        found.append(f"sliding-window attention (sliding_window={window})")
    if cap := given("attn_logit_softcapping", "final_logit_softcapping"):
        found.append(f"logit softcapping ({cap}={getattr(text, cap)}), which the chunked loss does not apply")
    if getattr(config, "quantization_config", None):
        found.append("quantised weights (give the model as it was before)")
    return found


def check_model(model: Any, what: str = "model") -> None:
    """UserError for what is no transformers causal LM with its weights at hand."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "lm_head"):
        raise UserError(
            f"{what} is a {type(model).__name__}: give a transformers causal LM, such as distill.load(path).model (one "
            "with PEFT adapters merged, merge_and_unload(); one that is compiled as it was before)"
        )
    if away := next((name for name, tensor in model.named_parameters() if tensor.is_meta), None):
        raise UserError(f"{what} has no weights at hand for {away} (offloaded, or on the meta device): load it whole")


def is_hybrid(config: Any) -> bool:
    """Whether a config is that of a hybrid of ours."""
    return isinstance(config, HybridConfigMixin)


def check_convertible(config: Any) -> str:
    """The family (model_type of the teacher) of a config; UserError where no hybrid can be made of it."""
    family = str(config.model_type).removeprefix("hybrid_")
    reasons = obstacles(config)
    if reasons or family not in FAMILIES:
        why = "; ".join(reasons) or "its blocks are not of a kind that is known here"
        raise UserError(
            f"architecture '{config.model_type}' cannot be converted: {why}\n"
            f"supported: {', '.join(FAMILIES)}, dense and with full attention in every block"
        )
    return family


def check_teacher(config: Any) -> str:
    """``check_convertible`` of what is to be the teacher: UserError also for a hybrid of ours."""
    if is_hybrid(config):
        placed = f"{len(replaced_blocks(config.mixers or []))} of {config.num_hidden_layers} blocks replaced"
        raise UserError(
            f"the teacher is a hybrid of ours already ({config.model_type}, {placed})\n"
            "give as teacher the transformer that it was made from, and name the hybrid under start_from: "
            "start_from.H1-h=FOLDER"
        )
    return check_convertible(config)


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
    wanted = config.resolved(mixer_options(mixer))
    for key, old in config.mixer_config.items():
        if key != "conv_init" and old != wanted[key]:
            raise UserError(f"mixer.{key}={wanted[key]}, but the mixers already there have {key}={old}")


def start_mixer(mixer: Any, attention: nn.Module, init: str, seed: int, block: int) -> None:
    """Initialise a mixer in place; its bits depend on ``seed``, the block and the attention that it replaces alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed * 10_007 + block)
        mixer.reset_parameters()
        initialiser(init)(mixer, attention)


def new_mixer(model: Any, block: int, mixer: MixerConfig, seed: int = 0) -> Any:
    """The mixer that ``hybridize`` would give ``block`` of ``model``, by itself and on the model's device.

    Raises UserError as ``hybridize`` does.
    """
    before = getattr(model.config, "mixers", None) or [ATTENTION] * model.config.num_hidden_layers
    config = hybrid_config(model.config, replace(before, [block], mixer.of), mixer)
    check_options(model.config, mixer)
    with torch.random.fork_rng():
        made = mixer_class(mixer.of(block))(config, block).to(model.dtype)
    keep_fp32(made)
    start_mixer(made, model.model.layers[block].self_attn, mixer.init, seed, block)
    return made.to(model.device)


def hybridize(
    model: Any,
    mixers: Sequence[str],
    mixer: MixerConfig,
    *,
    seed: int = 0,
    take: bool = False,
    given: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
) -> Any:
    """A hybrid with placement ``mixers`` from ``model`` (a teacher, or a hybrid with fewer blocks replaced).

    Blocks that newly lose attention are initialised by ``mixer.init`` from the attention that they had; all
    other weights are copied bit for bit, so that H1-0/L is the teacher. The new mixers depend on ``seed`` and
    the block alone: a block starts the same whichever others are swapped with it.

    Args:
        take: have the model's own tensors in place of copies, so that two models are never held; training the hybrid
            would change the model.
        given: by block, weights of a new mixer in place of those that ``mixer.init`` would give it (aligned ones).

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
    with torch.random.fork_rng(), torch.device("meta") if take else nullcontext():
        hybrid = model_class(config).to(model.dtype)
    hybrid.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its frequencies stay in float32
    keep_fp32(hybrid)
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"model.layers.{block}.self_attn.") for block in changed)
    }
    missing, unexpected = hybrid.load_state_dict(kept, strict=False, assign=take)
    new = tuple(f"model.layers.{block}.self_attn." for block in changed)
    assert not unexpected and all(name.startswith(new) for name in missing if name != "lm_head.weight"), missing
    hybrid.tie_weights()
    for block in changed:
        target = hybrid.model.layers[block].self_attn
        if take:
            target.to_empty(device="cpu")
        if given is not None and block in given:
            target.load_state_dict(given[block])
        else:
            start_mixer(target, model.model.layers[block].self_attn, mixer.init, seed, block)
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
