"""Rows of a data source, one at a time, each with where it stands: files, folders of them, saved data sets, the hub.

JSONL, JSON and CSV are read here, so that a malformed row can be named by its line; Parquet by pyarrow; what
``save_to_disk`` wrote and what lies on the hub by ``datasets``. Local files are read in place, nothing is copied to a
cache; a hub data set lies in Hugging Face's own cache (``HF_HOME``), or nowhere if it is streamed.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from huggingface_hub import HfApi, constants
from pyarrow import parquet

from distill.config import Origin
from distill.data.jsonl import UNREADABLE, iterate_rows, open_text
from distill.errors import UserError, nearest

Located = tuple[str, Any]
"""Where a row stands, for messages, and the row."""

EMBEDDED = "embedded"
SHARDS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
"""Endings of the files that a folder is read for."""
FORMS = f"'{EMBEDDED}', a file (JSONL, JSON, CSV, Parquet), a folder of them, or a hub name (owner/name)"
SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub(source: str) -> bool:
    """Whether a source is a hub name: ``owner/name``, where no such path nor its folder is here."""
    path = Path(source).expanduser()
    return (
        bool(HUB_NAME.fullmatch(source))
        and not source.endswith((*SHARDS, ".json", ".gz"))
        and not path.exists()
        and not path.parent.is_dir()
    )


def check_place(origin: Origin, key: str) -> None:
    """Raise UserError where a source (that ``key`` names) is neither here nor a hub name."""
    source = origin.source
    path = Path(source).expanduser()
    if source == EMBEDDED or path.is_file() or is_hub(source):
        return
    if path.is_dir():
        if not is_saved(path):
            shards(origin, key)
        return
    here = [str(found) for ending in (*SHARDS, ".json") for found in path.parent.glob(f"*{ending}")]
    raise UserError(f"{key}: no such file: {source}{nearest(source, [EMBEDDED, *here])} (give {FORMS})")


def files(origin: Origin) -> list[Path]:
    """The local files that a source is read from; none for the embedded data and the hub."""
    path = Path(origin.source).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file()) if is_saved(path) else shards(origin)
    return [path] if origin.source != EMBEDDED and path.is_file() else []


def is_saved(folder: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` writes."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def shards(origin: Origin, key: str = "") -> list[Path]:
    """The files of a folder that belong to the split, in the order of their names.

    Where names say a split (``train-0001.parquet``, ``test/0.csv``) those of ``origin.split`` are taken, otherwise
    all. Raises UserError where there is none.
    """
    folder, key = Path(origin.source).expanduser(), f"{key}: " if key else ""
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(SHARDS) and path.is_file())
    if not found:
        raise UserError(f"{key}no data in the folder {origin.source}: it holds no {', '.join(SHARDS)} file")
    split_of = {path: _split(path.relative_to(folder), origin.split) for path in found}
    if not any(split_of.values()):
        return found
    taken = [path for path in found if split_of[path] == origin.split]
    if not taken:
        names = sorted({name for name in split_of.values() if name})
        raise UserError(f"{key}no split '{origin.split}' in {origin.source}; it has {', '.join(names)}")
    return taken


def _split(path: Path, wanted: str) -> str:
    """The split that a file's name says (or a folder's above it), or ``""``."""
    words = re.split(r"[^a-z0-9]+", str(path).lower())
    return next((word for word in reversed(words) if word in (*SPLITS, wanted.lower())), "")


def read(origin: Origin, *, streaming: bool = False) -> Iterator[Located]:
    """Every row of a source in order; with ``streaming`` a hub data set is not downloaded as a whole.

    Raises UserError for what cannot be read, naming the file, and the line or row where one is to blame.
    """
    path = Path(origin.source).expanduser()
    if path.is_dir() and is_saved(path):
        yield from _number(origin.source, _saved(path, origin.split))
    elif path.exists():
        for file in files(origin):
            yield from read_file(file)
    else:
        yield from _number(origin.source, _hub(origin, streaming))


def read_file(path: Path) -> Iterator[Located]:
    """Every row of one file; what is not Parquet, CSV or a JSON list is taken for JSONL."""
    if path.suffix == ".parquet":
        return _number(str(path), _parquet(path))
    if path.suffix == ".csv":
        return _csv(path)
    if path.suffix == ".json" and _is_list(path):
        return _number(str(path), _json(path))
    return ((f"{path}:{number}", row) for number, row in iterate_rows(path, lambda row: row))


def _number(name: str, rows: Iterator[Any]) -> Iterator[Located]:
    return ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[Any]:
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {_line(error)}") from error


def _csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)
    try:
        with open_text(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    names = len(reader.fieldnames or ())
                    raise UserError(f"{where}: a row of {_cells(row)} cells under a header of {names}")
                yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from error
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _cells(row: dict[Any, Any]) -> int:
    more = row.get(None) or ()
    return sum(value is not None for key, value in row.items() if key is not None) + len(more)


def _is_list(path: Path) -> bool:
    try:
        with open_text(path) as file:
            return next((line.strip()[0] for line in file if line.strip()), "") == "["
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> Iterator[Any]:
    try:
        with open_text(path) as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    yield from rows


def _saved(folder: Path, split: str) -> Iterator[Any]:
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow, JSON and file errors share no base; each means it cannot be read
        raise UserError(f"{folder} cannot be read as a saved data set: {_line(error)}") from error
    if isinstance(found, dict):
        if split not in found:
            raise UserError(f"no split '{split}' in {folder}; it has {', '.join(found)}")
        found = found[split]
    return iter(found)


def _hub(origin: Origin, streaming: bool) -> Iterator[Any]:
    try:
        found: Any = datasets.load_dataset(
            origin.source,
            origin.subset or None,
            split=origin.split,
            revision=hub_revision(origin),
            streaming=streaming,
        )
    except UserError:
        raise
    except Exception as error:  # HTTP, file and data set errors share no base; each means it cannot be had
        raise _unreachable(origin, error) from error
    return iter(found)


def hub_revision(origin: Origin) -> str:
    """The commit of a hub data set that ``revision`` (a branch, a tag, a commit, or empty) stands for now.

    Raises UserError where the hub cannot be asked, and its cache does not know either: at once, where ``load_dataset``
    would try again for minutes.
    """
    try:
        return str(HfApi().dataset_info(origin.source, revision=origin.revision or None).sha)
    except Exception as error:  # HTTP, proxy and offline errors share no base; the cache may still know
        folder = Path(constants.HF_HUB_CACHE) / f"datasets--{origin.source.replace('/', '--')}"
        known = folder / "refs" / (origin.revision or "main")
        if known.is_file():
            return known.read_text(encoding="utf-8").strip()
        if origin.revision and (folder / "snapshots" / origin.revision).is_dir():
            return origin.revision
        raise _unreachable(origin, error) from error


def _unreachable(origin: Origin, error: Exception) -> UserError:
    named = ", ".join(f"{k} '{v}'" for k, v in (("subset", origin.subset), ("split", origin.split)) if v)
    return UserError(
        f"the data set '{origin.source}' ({named}) cannot be had from the hub: {_line(error)}\n"
        f"check its name and the network (HF_HUB_OFFLINE=1 takes what is in the cache), or give a file or folder"
    )


def _line(error: Exception) -> str:
    """The first line of an error, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
