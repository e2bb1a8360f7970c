"""The run folder: atomic writes, steps with fingerprints, provenance.

A step reads what earlier steps wrote and writes one folder. It is built in ``NAME.partial`` and renamed when it is
whole, with ``step.json`` saying what it depended on: run again it is skipped, resumed if it was cut short,
and refused if what it depends on has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin

from distill.errors import UserError, brief

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
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    """Host, versions and time, kept beside every result (and out of every fingerprint)."""
    return {
        "host": platform.node(),
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

    ``inputs`` are JSON values; ``after`` are the fingerprints of the steps that it reads, by name.
    """

    name: str
    folder: Path
    inputs: dict[str, Any]
    after: dict[str, str]

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
        """Raise UserError where the step was finished with other inputs, saying which."""
        if not self.done:
            return
        record = read_record(self.folder / "step.json", fingerprint=str)
        if record.get("fingerprint") == self.fingerprint:
            return
        changed = differences(record.get("inputs"), self.inputs)
        lines = changed or [f"{line} (a step before it)" for line in differences(record.get("after"), self.after)]
        raise UserError(
            f"{self.folder} was made with other inputs:\n  " + "\n  ".join(lines[:3]) + "\n"
            "use --force to redo it and what depends on it, or another run_dir"
        )

    def perform(self, work: Callable[[Path], None], *, resumable: bool = False) -> bool:
        """Do ``work(folder)`` unless it is done already; returns whether anything was done.

        A partial folder with the same fingerprint is continued if ``resumable``, otherwise begun anew.
        """
        self.check()
        if self.done:
            return False
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
            write_json(finished, {**record, "seconds": seconds, "provenance": provenance()})
        mark.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.partial, self.folder)
        return True

    def _begun(self, mark: Path) -> bool:
        """Whether ``mark`` says that the partial folder was made with the same inputs."""
        try:
            return bool(json.loads(mark.read_text(encoding="utf-8"))["fingerprint"] == self.fingerprint)
        except (OSError, ValueError, KeyError, TypeError):  # absent or torn: begun anew
            return False

    def forget(self) -> None:
        """Remove what the step wrote, so that it is done again."""
        for folder in (self.folder, self.partial):
            if folder.exists():
                shutil.rmtree(folder)


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
    for step in steps:
        if step.name in gone:
            step.forget()
