"""The safetensors of a model folder, looked at before any of them is loaded: which file holds what, and whether the
files are whole. Other formats of weights can run code when they are read, and are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distill.errors import UserError, brief
from distill.records import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor -> the file of ``folder`` that holds it; one file, or the shards that an index names.

    Raises UserError where there are no safetensors, and for an index that is broken or names a file elsewhere.
    """
    index = folder / INDEX
    if index.is_file():
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{index} has no weight_map: the checkpoint is broken")
        for name in sorted(set(places.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}, which is no safetensors file of its own folder")
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, a shard that {INDEX} names: copy or download it again")
        return dict(places)
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read; only "
                "safetensors are loaded. If you trust the file, convert it:\n"
                "  python -c 'from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained("{folder}").save_pretrained("{folder}")\''
            )
        raise UserError(f"cannot read {folder / WEIGHTS}: the folder holds no weights, neither that file nor {INDEX}")
    with open_weights(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor -> (dtype, shape), from the headers alone; UserError for files that are missing, cut short or damaged."""
    found: dict[str, tuple[str, list[int]]] = {}
    places = tensor_files(folder)
    for name in sorted(set(places.values())):
        with open_weights(folder / name) as file:
            for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                part = file.get_slice(key)
                found[key] = (part.get_dtype(), list(part.get_shape()))
    if lacking := sorted(places.keys() - found.keys()):
        raise UserError(f"{folder / INDEX} names tensors that its files lack, such as {lacking[0]}")
    return found


def open_weights(path: Path) -> Any:
    """A safetensors file, opened; UserError where it is missing or broken."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path}: {brief(error)}; the file is damaged or cut short: copy or download it again"
        ) from error
