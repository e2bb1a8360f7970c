"""A hybrid as a GraniteMoeHybrid folder, which stock transformers, vLLM and SGLang load; and such a folder read back.

Exact: the same logits up to the order in which sums are taken. Tensors go through block by block and shard by shard;
the folder appears whole or not at all. The hybrid's own config lies beside them (``distill.json``), so that
`import_folder` gives back the very tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from distill.errors import UserError
from distill.export.granite import MODEL_TYPE, MULTIPLIERS, container_config, obstacles
from distill.export.granite_weights import Read, from_container, to_container
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import is_hybrid
from distill.mixers import ATTENTION
from distill.records import read_json, write_json
from distill.storage import fresh_folder
from distill.teacher import load_config
from distill.weights import INDEX, WEIGHTS, open_weights, tensor_files

__all__ = ["export", "import_folder", "obstacles"]

SHARD = 4 << 30
"""Bytes of a file of weights, at most one block more."""
ORIGIN = "distill.json"
CARRIED = ("generation_config.json", "lineage.json", "*.jinja", "*.model", "*.txt", "*token*.json", "vocab.json")
"""What goes along as it is: tokenizer, chat template, settings of generation, what the weights cost."""


def export(checkpoint: Path, output: Path, *, shard: int = SHARD) -> list[str]:
    """Write the hybrid in ``checkpoint`` to ``output``; returns the names of its tensors.

    Raises UserError, before anything is written, for what is no hybrid, cannot be held (``obstacles``) or is damaged,
    for an ``output`` that exists, and where the disk has no room.
    """
    config = load_config(str(checkpoint))
    if not is_hybrid(config):
        raise UserError(f"{checkpoint} is a '{config.model_type}' model, no hybrid of ours: tools load it as it is")
    if found := obstacles(config):
        raise UserError(f"{checkpoint} cannot be exported to hf-native: {'; '.join(found)}")
    with reader(checkpoint) as read, fresh_folder(output, room=weight_bytes(checkpoint)) as partial:
        written = write_shards(to_container(config, read), partial, shard)
        write_json(partial / "config.json", container_config(config))
        write_json(partial / ORIGIN, read_json(checkpoint / "config.json"))
        carry(checkpoint, partial)
    return written


def import_folder(folder: Path, output: Path, *, shard: int = SHARD) -> list[str]:
    """Read a GraniteMoeHybrid folder back as a hybrid, to distil it further; returns the names of its tensors.

    One that ``export`` wrote becomes the very hybrid that it was; another of that form one of the Granite family.

    Raises UserError for a folder of another kind, or one whose blocks are no ``mamba2``.
    """
    config = hybrid_config_of(folder)
    with reader(folder) as read, fresh_folder(output, room=weight_bytes(folder)) as partial:
        written = write_shards(from_container(config, read), partial, shard)
        config.save_pretrained(partial)
        carry(folder, partial)
    return written


def hybrid_config_of(folder: Path) -> Any:
    """The config of the hybrid that a GraniteMoeHybrid folder holds."""
    keys = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if keys.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{folder} is no {MODEL_TYPE} folder (model_type: {keys.get('model_type')}): 'import' reads those"
        )
    if (folder / ORIGIN).is_file():
        found = read_json(folder / ORIGIN)
        config = AutoConfig.for_model(found.pop("model_type"), **found)
        same = ("layer_types", "hidden_size", "num_attention_heads", "mamba_d_state", "vocab_size", "intermediate_size")
        wanted = container_config(config)
        if differing := [key for key in same if wanted[key] != keys.get(key)]:
            raise UserError(f"{folder / ORIGIN} is of another model: {differing[0]} is {keys.get(differing[0])} here")
        return config
    return foreign_config(folder, keys)


def foreign_config(folder: Path, keys: dict[str, Any]) -> Any:
    """The hybrid config of a GraniteMoeHybrid model that we did not write."""
    heads, hidden = keys.get("num_attention_heads", 0), keys.get("hidden_size", 0)
    width = hidden // max(heads, 1)
    needed = {
        "num_local_experts": 0, "position_embedding_type": "rope", "mamba_n_heads": heads, "mamba_n_groups": heads,
        "mamba_d_head": width, "mamba_d_state": width, "mamba_expand": 1, "mamba_conv_bias": True,
        "shared_intermediate_size": keys.get("intermediate_size"),
    }  # fmt: skip
    layers = ["mamba" if kind in ("mamba", "linear_attention") else "attention" for kind in keys.get("layer_types", [])]
    other = [f"{key}={keys.get(key)} ({value} is needed)" for key, value in needed.items() if keys.get(key) != value]
    if other and ("mamba" in layers or not other[0].startswith("mamba")):
        raise UserError(f"{folder} holds no hybrid of ours: {', '.join(other[:3])}")
    hybrid, _ = FAMILIES["granite"]
    names = set(hybrid().to_dict()) - {"model_type", "architectures", "layer_types", "transformers_version"}
    given = {key: value for key, value in keys.items() if key in names}
    given |= {key: keys.get(key, 1.0) for key in (*MULTIPLIERS, "attention_multiplier")}
    mixers = ["mamba2" if kind == "mamba" else ATTENTION for kind in layers]
    return hybrid(**given, head_dim=width, mixers=mixers, mixer_config={"d_conv": keys.get("mamba_d_conv", 4)})


@contextmanager
def reader(folder: Path) -> Iterator[Read]:
    """From a tensor's name to the tensor, out of a folder's safetensors; UserError for one that is not there."""
    places = tensor_files(folder)
    with ExitStack() as stack:
        opened: dict[str, Any] = {}

        def read(name: str) -> torch.Tensor:
            if name not in places:
                raise UserError(f"{folder} has no tensor {name}: it is damaged, or its config is of another model")
            file = places[name]
            if file not in opened:
                opened[file] = stack.enter_context(open_weights(folder / file))
            return opened[file].get_tensor(name)

        yield read


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum((folder / name).stat().st_size for name in set(tensor_files(folder).values()))


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, limit: int) -> list[str]:
    """Write tensors as safetensors of about ``limit`` bytes with an index, or as one file; returns their names."""
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        files.append(list(held))
        save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= limit:
            flush()
            size = 0
    if held:
        flush()
    names = (
        [WEIGHTS]
        if len(files) == 1
        else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    for number, name in enumerate(names, 1):
        (folder / f"{number}.part").rename(folder / name)
    if len(files) > 1:
        places = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
    return [key for keys in files for key in keys]


def carry(source: Path, target: Path) -> None:
    """Copy what goes along as it is."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
