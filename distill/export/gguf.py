"""A hybrid as a GGUF file, which llama.cpp runs on a laptop; tokenizer, chat template and origin included.

llama.cpp knows the same container as `hf_native` under the name ``granitehybrid``: config and tensors come from the
code that makes that folder, and are written one after the other, so that never more than a block is in memory. The
file appears whole or not at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.errors import UserError, choose
from distill.export.gguf_tokenizer import Vocabulary, vocabulary
from distill.export.gguf_weights import architecture, kept_whole, to_gguf
from distill.export.granite import container_config
from distill.export.granite import obstacles as container_obstacles
from distill.export.granite_weights import Tensors
from distill.export.hf_native import reader
from distill.hybrid.surgery import is_hybrid
from distill.storage import check_fresh, fresh_file
from distill.teacher import check_tokenizer, load_config, load_tokenizer
from distill.weights import headers

INSTALL = "pip install 'distill-hybrid[gguf]' (or gguf alone, to write files without running them)"
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Types of a file's matrices; norms, biases, convolutions and what the SSM's states depend on are in f32 always."""
STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
ORIGIN = "distill.config"
"""Key of a file that holds the hybrid's own config.json."""
LINEAGE = "distill.lineage"
ROPES = ("default", "llama3", "linear")
SLACK = 1 << 20
"""Bytes for what a file holds beside tensors and tokenizer."""


def obstacles(config: Any) -> list[str]:
    """Why a hybrid with this config cannot be held by a GGUF file; empty where it can, and then it is held exactly."""
    found = container_obstacles(config)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        found.append(f"rotary positions scaled by {rope}, where {', '.join(ROPES)} are written")
    return found


def tokenizer_obstacles(teacher: str, config: Any) -> list[str]:
    """Why a GGUF file cannot hold the tokenizer of a teacher with this config; empty where it can."""
    try:
        vocabulary(Path(teacher), load_tokenizer(teacher), config.vocab_size)
    except UserError as error:
        return [str(error).splitlines()[0]]
    return []


def export(checkpoint: Path, output: Path, dtype: str = "auto") -> list[str]:
    """Write the hybrid in ``checkpoint`` to the file ``output``; returns the names of its tensors.

    Args:
        dtype: f32, f16 or bf16; auto: as the weights lie in ``checkpoint``, so that nothing is rounded.

    Raises UserError, before anything is written, where the package gguf is missing, for what is no hybrid, cannot be
    held (``obstacles``) or is damaged, for a tokenizer that llama.cpp has not, for an ``output`` that exists, and where
    the disk has no room.
    """
    check_installed()
    config = load_config(str(checkpoint))
    if not is_hybrid(config):
        raise UserError(f"{checkpoint} is a '{config.model_type}' model, no hybrid of ours: llama.cpp converts it")
    if found := obstacles(config):
        raise UserError(f"{checkpoint} cannot be exported to gguf: {'; '.join(found)}")
    if output.suffix != ".gguf":
        raise UserError(f"--output {output} must be a file named *.gguf")
    check_fresh(output)
    stored = headers(checkpoint)
    kind = STORED.get(stored["model.embed_tokens.weight"][0], "f32") if dtype == "auto" else dtype.lower()
    choose("type of a GGUF file", kind, TYPES)
    check_tokenizer(str(checkpoint), config.vocab_size, chats=False)
    words = vocabulary(checkpoint, load_tokenizer(str(checkpoint)), config.vocab_size)
    shapes = list(typed(to_gguf(config, meta_reader(checkpoint, stored)), TYPES[kind]))
    room = sum(tensor.nbytes for _, tensor in shapes) + 4 * len(words.core) + SLACK
    with reader(checkpoint) as read, fresh_file(output, room=room) as partial:
        writer = opened(partial, architecture(config))
        try:
            describe(writer, config, checkpoint, kind)
            describe_tokenizer(writer, words)
            for name, tensor in shapes:
                writer.add_tensor_info(name, tensor.shape, np.dtype("uint16"), tensor.nbytes, raw_dtype(tensor.dtype))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in typed(to_gguf(config, read), TYPES[kind]):
                writer.write_tensor_data(array(name, tensor))
        finally:
            writer.close()
    return [name for name, _ in shapes]


def check_installed() -> None:
    """UserError, which says what to do, where the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--to gguf needs the package gguf, which is not installed: {INSTALL}")


def opened(path: Path, arch: str) -> Any:
    """The package's writer of a file."""
    from gguf import GGUFWriter

    return GGUFWriter(path, arch)


def meta_reader(checkpoint: Path, stored: dict[str, tuple[str, list[int]]]) -> Any:
    """From a tensor's name to a tensor of its shape without its numbers."""

    def read(name: str) -> torch.Tensor:
        if name not in stored:
            raise UserError(f"{checkpoint} has no tensor {name}: it is damaged, or its config is of another model")
        return torch.empty(stored[name][1], device="meta")

    return read


def typed(tensors: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor in the type that it has in the file."""
    for name, tensor in tensors:
        yield name, tensor.to(torch.float32 if kept_whole(name, tensor) else dtype)


def raw_dtype(dtype: torch.dtype) -> Any:
    """The package's name for a type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[next(name for name, each in TYPES.items() if each == dtype).upper()]


def array(name: str, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bytes as numpy takes them; UserError where its numbers do not fit f16."""
    if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
        raise UserError(f"{name} has numbers beyond the range of f16: take --dtype bf16 or f32")
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def describe(writer: Any, config: Any, checkpoint: Path, kind: str) -> None:
    """The model's keys, from the config of the container."""
    from gguf import LlamaFileType, RopeScalingType

    keys = container_config(config)
    heads, width, rope = keys["num_attention_heads"], keys["mamba_d_head"], keys.get("rope_parameters") or {}
    writer.add_name(checkpoint.resolve().name)
    writer.add_file_type(LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(2)
    writer.add_vocab_size(keys["vocab_size"])
    writer.add_context_length(keys["max_position_embeddings"])
    writer.add_embedding_length(keys["hidden_size"])
    writer.add_block_count(keys["num_hidden_layers"])
    writer.add_feed_forward_length(keys["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(keys["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(keys["rope_theta"])
    writer.add_rope_scaling_finetuned(True)  # by which llama.cpp tells Granite models with RoPE from those without
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_attention_scale(keys["attention_multiplier"])
    writer.add_embedding_scale(keys["embedding_multiplier"])
    writer.add_residual_scale(keys["residual_multiplier"])
    writer.add_logit_scale(keys["logits_scaling"])
    kv = keys["num_key_value_heads"]
    if architecture(config) == "granite":
        writer.add_head_count_kv(kv)
    else:
        writer.add_head_count_kv([kv if layer == "attention" else 0 for layer in keys["layer_types"]])
        writer.add_ssm_conv_kernel(keys["mamba_d_conv"])
        writer.add_ssm_inner_size(2 * heads * width)
        writer.add_ssm_state_size(keys["mamba_d_state"])
        writer.add_ssm_time_step_rank(2 * heads)
        writer.add_ssm_group_count(keys["mamba_n_groups"])
    writer.add_string(ORIGIN, (checkpoint / "config.json").read_text())
    if (checkpoint / "lineage.json").is_file():
        writer.add_string(LINEAGE, (checkpoint / "lineage.json").read_text())


def describe_tokenizer(writer: Any, words: Vocabulary) -> None:
    """The tokenizer's keys."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.scores:
        writer.add_token_scores(words.scores)
    else:
        writer.add_token_merges(words.merges)
    for name, place in words.ids.items():
        getattr(writer, f"add_{name}_token_id")(place)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    writer.add_add_space_prefix(words.add_space_prefix)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)
    writer.add_string("tokenizer.huggingface.json", words.core)
