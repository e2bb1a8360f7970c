"""Files that are there whole or not at all, checksums that say so later, and a disk that is full.

What is written counts only once it lies on the disk under its own name: every file and folder is synced, then renamed,
then the folder that holds the name is synced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import UserError

PARTIAL = "partial"
"""Folder in which ``new_folder`` builds, beside what it builds."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a quota that is used up, and a file-size limit (ulimit -f, or the file system's)."""
SHORT = r"inline_container|iostream error|^\d+ requested and \d+ written$"
_verified: dict[tuple[int, int, int, int], str] = {}


class DiskFull(UserError):
    """Something could not be written for want of room."""


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """``sync`` everything in a folder, and the folder."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def building_place(target: Path) -> Path:
    """Where ``new_folder`` builds ``target``."""
    return target.parent / PARTIAL / target.name


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields ``partial/NAME`` beside ``target``, which then takes its place.

    What a killed process left is removed before, and on any error what is half written. Raises DiskFull.
    """
    partial = building_place(target)
    shutil.rmtree(partial.parent, ignore_errors=True)
    try:
        with full_disk_named(target.parent):
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial.parent, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    partial.parent.rmdir()
    sync(target.parent)


def check_fresh(target: Path, room: int = 0) -> None:
    """Raise UserError where ``target`` exists or could not be written, DiskFull where ``room`` bytes do not fit."""
    if "\0" in str(target):
        raise UserError(f"cannot write {str(target)!r}: a name has no NUL")
    try:
        if os.path.lexists(target):
            raise UserError(f"{target} exists already: give another name, or remove it")
        place = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.is_dir())
    except OSError as error:  # a name too long
        raise UserError(f"cannot write {str(target)!r:.200}: {error}") from error
    if room > (free := shutil.disk_usage(place).free):
        raise DiskFull(
            f"cannot write {target}: it takes {room / 2**20:,.1f} MiB, and {place} has {free / 2**20:,.1f} MiB free\n"
            "make room there, or give a folder on a larger disk"
        )


@contextmanager
def fresh_file(target: Path, room: int = 0) -> Iterator[Path]:
    """As ``fresh_folder`` for a file: yields ``.NAME.*.partial`` beside ``target``, which then takes its name."""
    check_fresh(target, room)
    partial: Path | None = None
    try:
        with full_disk_named(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".partial", dir=target.parent)
            os.close(handle)
            partial = Path(name)
            partial.chmod(0o666 & ~_umask())
            yield partial
            sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r:.200}: {error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def fresh_folder(target: Path, room: int = 0) -> Iterator[Path]:
    """A folder of the user's own naming, whole or not at all: yields ``.NAME.*.partial``, which then takes its name.

    On any error what is half written is removed; nothing else is touched (a killed process leaves its own half).
    ``room`` is how many bytes it will take. Raises UserError, before anything is written, where ``target`` exists or
    cannot be written, DiskFull where there is no room.
    """
    check_fresh(target, room)
    partial: Path | None = None
    try:
        with full_disk_named(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".partial", dir=target.parent))
            partial.chmod(0o777 & ~_umask())
            yield partial
            sync_tree(partial)
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r:.200}: {error}") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)


def _umask() -> int:
    """What permissions new files do not get; mkdtemp gives a folder to its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, skip: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """``{relative path: {"size": bytes, "sha256": hex}}`` of every file but those whose first part is in ``skip``.

    Each file is read once, several at a time.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.relative_to(folder).parts[0] not in skip]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(_digest, files)
        return {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, sums, strict=True)
        }


def damage(folder: Path, files: dict[str, dict[str, Any]]) -> tuple[Path, str] | None:
    """The first of ``files`` (as ``checksums`` gives them) that is not as noted, and what is wrong with it.

    A file that this process has found whole is not read again unless its time of change is another.
    """
    present = {}
    for name, noted in files.items():
        path = folder / name
        if not path.is_file():
            return path, "is missing"
        state = path.stat()
        if state.st_size != noted["size"]:
            return path, f"has {state.st_size:,} bytes in place of {noted['size']:,}"
        present[path] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns), noted["sha256"]
    unread = {path: noted for path, noted in present.items() if _verified.get(noted[0]) != noted[1]}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (path, (key, expected)), found in zip(unread.items(), pool.map(_read, unread), strict=True):
            if found != expected:
                return path, found if found.startswith("cannot") else "is damaged: its checksum is another"
            _verified[key] = found
    return None


def _read(path: Path) -> str:
    """The digest, or why there is none: a disk that fails under a file is a fault of that file."""
    try:
        return _digest(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def no_room(error: BaseException | None) -> tuple[str, Path | None] | None:
    """What ran out where ``error`` comes of a full disk, and the file if it is known; None for any other error.

    An OSError has a number; safetensors gives it in its text; torch.save and numpy give none, but their writers fail
    (in ``inline_container`` or as it closes the stream; with counts) only where a write came up short.
    """
    while error is not None:
        number = getattr(error, "errno", None)
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
        elif isinstance(error, RuntimeError | OSError) and re.search(SHORT, str(error)):
            number = errno.ENOSPC
        if number in NO_ROOM:
            name = getattr(error, "filename2", None) or getattr(error, "filename", None)
            return os.strerror(number), Path(name) if isinstance(name, str) else None
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk under ``folder`` raises into one DiskFull that says where and how much is free."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, SafetensorError and torch's RuntimeError share no base
        if (found := no_room(error)) is None:
            raise
        reason, path = found
        place = path.parent if path is not None and path.parent.is_dir() else folder
        while not place.is_dir():
            place = place.parent
        usage = shutil.disk_usage(place)
        free, total = usage.free / 2**20, usage.total / 2**20
        raise DiskFull(
            f"cannot write to {place}: {reason} ({free:,.1f} of {total:,.1f} MiB free: too little for it)\n"
            "what was finished stands, and what was half written is removed; make room there, or move the folder to "
            "a larger disk: the same command continues"
        ) from error
