"""Linear average of two checkpoints of one architecture: alpha * A + (1 - alpha) * B (Apriel-H1, H1-30-SFT).

Tensor by tensor from safetensors, in A's sharding: at most one output shard is in memory, never a whole model beside
another. Everything is checked on the headers before anything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill.errors import UserError
from distill.placement import ATTENTION
from distill.records import differences, read_json, write_json
from distill.storage import fresh_folder
from distill.weights import headers, tensor_files

FLOATS = ("F64", "F32", "F16", "BF16")
COPIED = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that the merged checkpoint takes from A: config, tokenizer, generation config, index."""
UNSHAPED = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Keys of config.json in which two checkpoints may differ and still be averaged."""
SHOWN = 3  # differences named in a message


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with config.json that ``path`` names: itself, or the checkpoint of a stage or a step of a run."""
    given = Path(path).expanduser()
    for inner in ("", "checkpoint", "merge/checkpoint", "train/checkpoint"):
        if (given / inner / "config.json").is_file():
            return given / inner
    raise UserError(f"{path} is no checkpoint: neither config.json nor a stage's checkpoint is in it")


def merge(a: Path, b: Path, alpha: float, output: Path) -> dict[str, Any]:
    """Write alpha * A + (1 - alpha) * B to ``output``, whole or not at all; returns the record (merge.json).

    Averaged in float32 and stored in A's dtype; alpha = 1 gives A's weights bit for bit, alpha = 0 those of B, and
    where A and B agree the value stays. Config, tokenizer and generation config are A's. A tied weight that neither
    stores stays tied.

    Raises UserError, before anything is written, for alpha outside [0, 1], an ``output`` that exists, or checkpoints
    that differ in architecture, placement, or the keys, shapes or dtypes of their tensors.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha} must be in [0, 1]: the merge is alpha * A + (1 - alpha) * B")
    check_configs(a, b)
    files = check_tensors(a, b)
    record = {"a": str(a), "b": str(b), "alpha": alpha}
    with fresh_folder(output) as partial:
        for path in sorted(a.iterdir()):
            if path.is_file() and path.suffix in COPIED and path.name not in ("merge.json", "lineage.json"):
                shutil.copyfile(path, partial / path.name)
        for name, keys in files.items():
            save_file(dict(averages(a, b, keys, alpha)), partial / name, metadata={"format": "pt"})
        write_json(partial / "merge.json", record)
        if (lineage := merged_lineage(a, b, alpha)) is not None:
            write_json(partial / "lineage.json", lineage)
    return record


def averages(a: Path, b: Path, keys: list[str], alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, alpha * A + (1 - alpha) * B) for each of ``keys``, one tensor of each model at a time."""
    places = {folder: tensor_files(folder) for folder in (a, b)}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def tensor(folder: Path, key: str) -> torch.Tensor:
            path = folder / places[folder][key]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path].get_tensor(key)

        for key in keys:
            if alpha in (0, 1):
                yield key, tensor(a if alpha == 1 else b, key)
                continue
            left, right = tensor(a, key), tensor(b, key)
            exact = torch.promote_types(left.dtype, torch.float32)
            yield key, torch.lerp(right.to(exact), left.to(exact), alpha).to(left.dtype)


def check_configs(a: Path, b: Path) -> None:
    """Raise UserError where two checkpoints are not of one architecture with one placement."""
    left, right = (read_json(folder / "config.json") for folder in (a, b))
    for folder, config in ((a, left), (b, right)):
        if not isinstance(config, dict):
            raise UserError(f"{folder / 'config.json'} is no model config")
        blocks, mixers = config.get("num_hidden_layers"), config.get("mixers") or []
        if not isinstance(blocks, int) or not isinstance(mixers, list):
            raise UserError(f"{folder / 'config.json'} is broken: num_hidden_layers or mixers has another type")
    head = f"{a} and {b} cannot be merged: "
    if left.get("model_type") != right.get("model_type"):
        raise UserError(f"{head}architecture {left.get('model_type')} against {right.get('model_type')}")
    depth = left["num_hidden_layers"]
    if depth != right["num_hidden_layers"]:
        raise UserError(f"{head}{depth} blocks against {right['num_hidden_layers']}")
    placements = [config.pop("mixers", None) or [ATTENTION] * depth for config in (left, right)]
    other = [f"block {i}: {x} against {y}" for i, (x, y) in enumerate(zip(*placements, strict=False)) if x != y]
    if other:
        raise UserError(f"{head}their placements differ in {len(other)} block(s)\n  " + "\n  ".join(other))
    for config in (left, right):
        for key in (*UNSHAPED, "layer_types"):
            config.pop(key, None)
    if found := differences(left, right):
        raise UserError(f"{head}their configs differ (A -> B)\n  " + _some(found))


def check_tensors(a: Path, b: Path) -> dict[str, list[str]]:
    """File of A -> its tensors; UserError where keys, shapes or dtypes of A's and B's tensors differ."""
    left, right = headers(a), headers(b)
    found = [f"{key}: only in A" for key in left if key not in right]
    found += [f"{key}: only in B" for key in right if key not in left]
    for key in left.keys() & right.keys():
        if left[key] != right[key]:
            found.append(f"{key}: {_describe(left[key])} in A, {_describe(right[key])} in B")
        elif left[key][0] not in FLOATS:
            found.append(f"{key}: {left[key][0]} cannot be averaged; only {', '.join(FLOATS)}")
    if found:
        raise UserError(f"{a} and {b} cannot be merged: {len(found)} tensor(s) differ\n  " + _some(sorted(found)))
    files: dict[str, list[str]] = {}
    for key, name in tensor_files(a).items():
        files.setdefault(name, []).append(key)
    return files


def merged_lineage(a: Path, b: Path, alpha: float) -> list[dict[str, Any]] | None:
    """A's lineage (what its tokens were spent on) and an entry for the merge; None where either has none."""
    left, right = (folder / "lineage.json" for folder in (a, b))
    if not (left.is_file() and right.is_file()):
        return None
    entries, others = read_json(left), read_json(right)
    for file, content in ((left, entries), (right, others)):
        if not isinstance(content, list):
            raise UserError(f"{file} is broken: expected a list; mend it, or remove it to count no tokens")
    name = next((entry.get("name") for entry in reversed(others) if isinstance(entry, dict)), None)
    return [*entries, {"name": f"merged with {name or b} (alpha {alpha:g})", "tokens": 0, "steps": 0}]


def _describe(header: tuple[str, list[int]]) -> str:
    return f"{header[0]} {json.dumps(header[1])}"


def _some(lines: list[str]) -> str:
    """The first few lines, and how many more there are."""
    rest = len(lines) - SHOWN
    return "\n  ".join([*lines[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])])
