"""What a model or a data file is, for fingerprints: a hash of its contents, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distill.config import DataConfig
from distill.data.traces import EMBEDDED
from distill.records import fingerprint
from distill.teacher import resolve


def content(path: Path) -> str:
    """A hash of a file: all of it, or for a large one 64 blocks of 1 MiB spread over it, and its size."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= 64 * block:
            digest.update(file.read())
        else:
            for part in range(64):
                file.seek(part * (size - block) // 63)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def identity(name: str, config: Any) -> str:
    """A fingerprint of a model: its config, weights and tokenizer; of one on the hub, its revision."""
    keys = json.loads(config.to_json_string())
    keys.pop("transformers_version", None)
    folder = Path(resolve(name))
    if not folder.is_dir():
        return fingerprint([keys, getattr(config, "_commit_hash", None)])
    files = [path for kind in ("*.safetensors", "*.json", "*.jinja", "*.model") for path in folder.glob(kind)]
    skipped = ("config.json", "model.safetensors.index.json", "scores.json")
    return fingerprint([keys, [[path.name, content(path)] for path in sorted(files) if path.name not in skipped]])


def data_identity(data: DataConfig) -> str | dict[str, str]:
    """A fingerprint of the data file, or of each in the mixture; the embedded data follow from the seed."""
    if data.mixture:
        return {entry.source: source_identity(entry.source) for entry in data.mixture}
    return source_identity(data.source)


def source_identity(source: str) -> str:
    """A fingerprint of one source."""
    path = Path(source).expanduser()
    return content(path) if source != EMBEDDED and path.is_file() else source
