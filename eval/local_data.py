"""Data of lm-eval's tasks from a folder of copies, in place of the hub: ``DIR/openai/gsm8k/main/test-0000.parquet``.

Laid out as the hub's repositories are: a folder for each, in it one for each subset that it has, and files (Parquet,
JSONL, JSON, CSV) whose names say the split; a file whose name says none is all of ``train``, as on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from distill.config import Origin
from distill.data.sources import HUB_NAME, hub_revision
from distill.errors import UserError

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""File ending -> builder of ``datasets``; where a split lies in several forms, the first is taken."""
SPLITS = {
    "train": "train", "training": "train", "test": "test", "dev": "dev",
    "validation": "validation", "valid": "validation", "val": "validation",
}  # fmt: skip
PLAIN = ("", "default", "main", "all")
"""Subsets whose files may lie in the repository's folder itself."""
METRIC = "evaluate-metric/code_eval"


def splits(root: Path, name: str, subset: str | None) -> dict[str, list[Path]]:
    """The files of each split of a data set ``name`` below ``root``.

    Raises UserError where there are none, naming the folder that was looked in.
    """
    folder = root / name
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: copy the files of the hub's data set '{name}' there")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in READERS and path.is_file()]
    found = [path for path in found if path.name != "dataset_infos.json" and ".cache" not in path.parts]
    mine = [path for path in found if subset in (*path.relative_to(folder).parts[:-1], path.stem)]
    if not mine and (subset or "") in PLAIN:
        places = {path.relative_to(folder).parts[:-1] for path in found}
        plain = places & {(), ("data",)} or (places if len(places) == 1 else set())
        mine = [path for path in found if path.relative_to(folder).parts[:-1] in plain]
    if not mine:
        of = f" of its subset '{subset}', in {folder / subset}" if subset else f" in {folder}"
        raise UserError(f"no data of '{name}'{of}: copy Parquet or JSONL files there, named by their split")
    by_split: dict[str, list[Path]] = {}
    for path in mine:
        by_split.setdefault(_split(path.relative_to(folder), subset), []).append(path)
    return {split: _one_form(paths) for split, paths in by_split.items()}


def _split(path: Path, subset: str | None) -> str:
    """The split that a file's name says, or a folder's above it; without one it is ``train``."""
    for part in reversed([part for part in (*path.parts[:-1], path.stem) if part != subset]):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def _one_form(paths: list[Path]) -> list[Path]:
    best = min(paths, key=lambda path: list(READERS).index(path.suffix)).suffix
    return [path for path in paths if path.suffix == best]


def load(root: Path, name: str, subset: str | None = None) -> datasets.DatasetDict:
    """The data set ``name``, every split that is below ``root``."""
    parts = {}
    for split, paths in splits(root, name, subset).items():
        try:
            files = [str(path) for path in paths]
            parts[split] = datasets.load_dataset(READERS[paths[0].suffix], data_files=files, split="train")
        except Exception as error:  # arrow, JSON and builder errors share no base; each means it cannot be read
            raise UserError(f"{paths[0]} cannot be read: {(str(error) or type(error).__name__)[:200]}") from error
    return datasets.DatasetDict(parts)


@contextmanager
def reading(root: str) -> Iterator[None]:
    """Within, tasks find their data below ``root`` in place of the hub (as before, where ``root`` is empty)."""
    if not root:
        yield
        return
    import evaluate

    folder, original, metric = Path(root).expanduser(), datasets.load_dataset, evaluate.load

    def load_dataset(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return load(folder, path, name) if HUB_NAME.fullmatch(path) else original(path, name, *args, **kwargs)

    def load_metric(path: str, *args: Any, **kwargs: Any) -> Any:
        return metric(str(folder / METRIC) if path == "code_eval" else path, *args, **kwargs)

    datasets.load_dataset, evaluate.load = load_dataset, load_metric
    try:
        yield
    finally:
        datasets.load_dataset, evaluate.load = original, metric


def check(tasks: Iterable[Mapping[str, Any]], root: str) -> None:
    """Raise UserError where the data of a task (its config) are not to be had: no file below ``root``, or, without a
    ``root``, neither on the hub nor in its cache."""
    seen: set[str] = set()
    for task in tasks:
        name = str(task.get("dataset_path") or "")
        if task.get("custom_dataset") or not HUB_NAME.fullmatch(name):
            continue
        if root:
            _check_files(Path(root).expanduser(), task, name)
        elif name not in seen:
            seen.add(name)
            try:
                hub_revision(Origin(source=name))
            except UserError as error:
                raise UserError(
                    f"task '{task['task']}': {error}\nor set measure.local_data to a folder that holds {name}/..."
                ) from error


def _check_files(root: Path, task: Mapping[str, Any], name: str) -> None:
    if not root.is_dir():
        raise UserError(f"measure.local_data={root} is no folder")
    try:
        found = splits(root, name, task.get("dataset_name"))
    except UserError as error:
        raise UserError(f"task '{task['task']}': {error}") from error
    for split in needed(task) - found.keys():
        where = next(iter(found.values()))[0].parent
        raise UserError(
            f"task '{task['task']}' reads the split '{split}' of '{name}', and {where} holds "
            f"{', '.join(sorted(found))}: copy it there, as {split}.parquet or {split}.jsonl"
        )
    if task.get("unsafe_code") and not (root / METRIC / "code_eval.py").is_file():
        raise UserError(
            f"task '{task['task']}' scores with the hub's metric code_eval: copy code_eval.py and execute.py of "
            f"spaces/{METRIC} to {root / METRIC}"
        )


def needed(task: Mapping[str, Any]) -> set[str]:
    """The splits that a task opens: what is asked, and where its examples come from."""
    asked = task.get("test_split") or task.get("validation_split")
    few = task.get("fewshot_config") or {}
    examples = task.get("fewshot_split") or few.get("split")
    if not examples and not few.get("samples"):
        examples = task.get("training_split") or task.get("validation_split")
    return {split for split in (asked, examples) if split}
