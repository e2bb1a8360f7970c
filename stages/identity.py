"""What a model or a data file is, for fingerprints: a hash of its contents, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.config import DataConfig, Origin
from distill.data.mixture import label
from distill.data.sources import EMBEDDED, files, hub_revision, is_hub
from distill.errors import UserError
from distill.records import fingerprint
from distill.teacher import PROBE, load_tokenizer, resolve


def content(path: Path, blocks: int = 64) -> str:
    """A hash of a file: all of it, or for a large one ``blocks`` of 1 MiB spread over it, and its size."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= blocks * block:
            digest.update(file.read())
        else:
            for part in range(blocks):
                file.seek(part * (size - block) // (blocks - 1))
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


def check_same_tokenizer(name: str, teacher: str) -> None:
    """Raise UserError where a model of the teacher's has a tokenizer of its own that reads texts otherwise: the two
    could not be compared, nor could either be distilled from the other."""
    folder = Path(resolve(name))
    if not (folder / "tokenizer.json").is_file():  # it is asked in the teacher's
        return
    if which := tokenizers_differ(name, teacher):
        raise UserError(
            f"the tokenizer of '{name}' is not the teacher's ('{teacher}'): {which}. Both must be of one teacher: take "
            "the checkpoint's own teacher, or remove the tokenizer that was put into its folder"
        )


def tokenizers_differ(one: str, other: str, load: Callable[[str], Any] = load_tokenizer) -> str:
    """In what the tokenizers of two models differ, in words; empty where they read texts alike."""
    ours, theirs = load(one), load(other)
    mine, others = ours.get_vocab(), theirs.get_vocab()
    apart = [token for token in {*mine, *others} if mine.get(token) != others.get(token)]
    if apart:
        return f"{len(apart)} tokens differ, such as {min(apart)!r}"
    return "" if ours.encode(PROBE) == theirs.encode(PROBE) else "it cuts the same text in other tokens"


def data_identity(data: DataConfig) -> str | dict[str, str]:
    """A fingerprint of the data, or of each source in the mixture; the embedded data follow from the seed."""
    if data.mixture:
        return {label(entry): source_identity(entry) for entry in data.mixture}
    return source_identity(data)


def source_identity(origin: Origin) -> str:
    """A fingerprint of one source: the contents of its files and, in a folder, their names; on the hub, the commit."""
    path = Path(origin.source).expanduser()
    if origin.source != EMBEDDED and path.is_dir():
        found = files(origin)
        blocks = max(256 // max(len(found), 1), 2)  # the begin and the end at least: where Parquet says what it holds
        return fingerprint([[str(file.relative_to(path)), content(file, blocks)] for file in found])
    if is_hub(origin.source):
        return f"commit {hub_revision(origin)}"
    return next((content(file) for file in files(origin)), origin.source)
