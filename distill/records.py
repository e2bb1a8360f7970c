"""The run folder: atomic writes, steps with fingerprints, provenance.

A step reads what earlier steps wrote and writes one folder. It is built in ``NAME.partial`` and renamed when it is
whole, with ``step.json`` saying what it depended on and the checksum of every file: run again it is skipped, resumed if
it was cut short, and refused if what it depends on has changed or was damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin

from distill.errors import UserError, brief
from distill.machine import command, device
from distill.storage import DiskFull, checksums, damage, full_disk_named, sync, sync_tree

PACKAGES = ("torch", "transformers", "accelerate", "lm-eval", "numba", "numpy", "trl")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or torn file is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run the step that writes it first") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {brief(error)}") from error


def read_record(path: Path, **kinds: Any) -> dict[str, Any]:
    """The JSON object in ``path``, which must have a value of the right type under each key of ``kinds``
    (``minutes=float``, ``order=list[int]``).

    Raises UserError where it is missing, torn or has another form, saying how to get it again.
    """
    remedy = f"remove {path.parent} and run the step that writes it again"
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}\n{remedy}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is broken: a {type(record).__name__} in place of an object\n{remedy}")
    for key, kind in kinds.items():
        value: Any = record.get(key)
        listed, wanted = get_origin(kind) is list, (get_args(kind) or (kind,))[0]
        if listed and not isinstance(value, list):
            raise UserError(f"{path} is broken: no list '{key}'\n{remedy}")
        for item in value if listed else [value]:
            if isinstance(item, bool) or not isinstance(item, (int, float) if wanted is float else wanted):
                raise UserError(
                    f"{path} is broken: '{key}' has {brief(repr(item), 60)}, no {wanted.__name__}\n{remedy}"
                )
    return record


def fingerprint(value: Any) -> str:
    """A hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Host, device, command, versions and time, kept beside every result (and out of every fingerprint)."""
    return {
        "host": platform.node(),
        "device": device(),
        "command": command(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """``key: old -> new`` for every leaf in which two mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}{key}.")
        ]
    same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if same else [f"{prefix.rstrip('.')}: {old} -> {new}"]


@dataclass(frozen=True)
class Step:
    """One step of a run: where it writes and what it depends on.

    ``inputs`` are JSON values; ``after`` are the fingerprints of the steps that it follows, by name; ``reads`` are the
    files and folders, each within a step's folder, that its work opens.
    """

    name: str
    folder: Path
    inputs: dict[str, Any]
    after: dict[str, str]
    reads: tuple[Path, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the inputs and of everything before."""
        return fingerprint([self.inputs, self.after])

    @property
    def partial(self) -> Path:
        """Where the step is built."""
        return self.folder.with_name(self.folder.name + ".partial")

    @property
    def done(self) -> bool:
        """Whether the step has been finished (with these inputs or others: see ``check``)."""
        return (self.folder / "step.json").is_file()

    def check(self) -> None:
        """Raise UserError where the step was finished with other inputs, or has checkpoints of a training that was
        begun with others, saying which."""
        if self.done:
            folder, how, file = self.folder, "made", self.folder / "step.json"
        else:
            folder, how, file = self.partial, "begun", self.partial / "inputs.json"
            if not file.is_file() or not any((folder / "checkpoints").glob("checkpoint-*")):
                return
        record = read_record(file, fingerprint=str)
        if record.get("fingerprint") == self.fingerprint:
            return
        changed = differences(record.get("inputs"), self.inputs)
        lines = changed or [f"{line} (a step before it)" for line in differences(record.get("after"), self.after)]
        raise UserError(
            f"{folder} was {how} with other inputs:\n  " + "\n  ".join(lines[:3]) + "\n"
            "use --force to redo it and what depends on it, or another run_dir"
        )

    def perform(self, work: Callable[[Path], None], *, resumable: bool = False, scratch: Sequence[str] = ()) -> bool:
        """Do ``work(folder)`` unless it is done already; returns whether anything was done.

        A partial folder with the same fingerprint is continued if ``resumable``, otherwise begun anew. ``scratch`` are
        names in it that only a resumption needs: they go once all else is known to be whole.

        Raises UserError where a file that the step reads is damaged, DiskFull where there is no room.
        """
        self.check()
        if self.done:
            return False
        for path in self.reads:
            verify(path)
        try:
            with full_disk_named(self.folder.parent):
                self._build(work, resumable, scratch)
        except DiskFull:
            if not resumable:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.partial, self.folder)
        sync(self.folder.parent)
        return True

    def _build(self, work: Callable[[Path], None], resumable: bool, scratch: Sequence[str]) -> None:
        """Bring the partial folder to its end."""
        mark, finished = self.partial / "inputs.json", self.partial / "step.json"
        if self.partial.exists() and not self._begun(finished) and not (resumable and self._begun(mark)):
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        if not self._begun(finished):
            record = {"step": self.name, "fingerprint": self.fingerprint, "inputs": self.inputs, "after": self.after}
            write_json(mark, record)
            began = time.monotonic()
            work(self.partial)
            seconds = round(time.monotonic() - began, 3)
            sync_tree(self.partial)
            files = checksums(self.partial, skip=(mark.name, *scratch))
            write_json(finished, {**record, "seconds": seconds, "provenance": provenance(), "files": files})
        for path in (mark, *(self.partial / name for name in scratch)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _begun(self, mark: Path) -> bool:
        """Whether ``mark`` says that the partial folder was made with the same inputs."""
        try:
            return bool(json.loads(mark.read_text(encoding="utf-8"))["fingerprint"] == self.fingerprint)
        except (OSError, ValueError, KeyError, TypeError):  # absent or torn: begun anew
            return False

    def forget(self) -> None:
        """Remove what the step wrote, so that it is done again."""
        for mark in (self.folder / "step.json", self.partial / "step.json", self.partial / "inputs.json"):
            mark.unlink(missing_ok=True)  # first: what is half removed is neither done nor gone on from
        for folder in (self.folder, self.partial):
            if folder.exists():
                shutil.rmtree(folder)


def verify(path: Path) -> None:
    """Raise UserError where a file at or under ``path`` is not as the step that wrote it noted in ``step.json``.

    All of them are read, once a process. A step from before there were checksums is taken as it is.
    """
    folder = next((folder for folder in (path, *path.parents[:2]) if (folder / "step.json").is_file()), None)
    if folder is None:
        return
    record = read_record(folder / "step.json", step=str)
    try:
        files = {name: noted for name, noted in record.get("files", {}).items() if (folder / name).is_relative_to(path)}
        found, finished = damage(folder, files), record["provenance"]["finished"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'step.json'} is broken: remove {folder} and run the step again") from error
    if found:
        stage, _, verb = record["step"].rpartition("/")
        again = f"remove {folder}"
        if folder.parents[1].name == "stages":
            again = f"distill {verb} {folder.parents[2]} --stage {int(stage.split('-')[0])} --force"
        raise UserError(
            f"{found[0]} {found[1]}; step {record['step']} wrote it, finished {finished}\n"
            f"do that step again ({again}), then this command"
        )


def dependents(steps: list[Step], names: set[str]) -> set[str]:
    """``names`` and every step that depends on one of them, directly or not."""
    found = set(names)
    for step in steps:  # in order, so that one pass reaches everything
        if found & step.after.keys():
            found.add(step.name)
    return found


def forget(steps: list[Step], names: set[str]) -> None:
    """Remove what the steps ``names``, and all that depend on them, have written."""
    gone = dependents(steps, names)
    for step in reversed(steps):
        if step.name in gone:
            step.forget()
