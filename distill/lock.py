"""One process at a time on a folder: a file that says who holds it, and when its holder counts as dead.

On the holder's own machine that is seen from its process number and start time. From another machine only its
heartbeat shows, the lock's time of change, set every few seconds: once that has stopped for ``STALE`` seconds the lock
is taken over. A requeued SLURM job takes over the lock of its own earlier start at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.errors import UserError

HEARTBEAT = 15.0
"""Seconds between signs of life."""
STALE = 120.0
"""Seconds without one after which a holder on another machine counts as dead."""
_held: dict[Path, dict[str, Any]] = {}
_stop = threading.Event()


def hold(path: Path, what: str) -> None:
    """Take the lock file ``path`` for this process, until ``release``; a lock that it holds already is fine.

    Args:
        what: what is locked, for messages.

    Raises UserError naming the holder where another living process has it, OSError where it cannot be written.
    """
    path = path.absolute()
    if path in _held or int(os.environ.get("RANK", "0")):  # of the processes of one job, the first holds it
        return
    mine = myself()
    with _guarded(path.parent):
        while not _write_new(path, mine):
            if check(path, what):
                path.unlink(missing_ok=True)
    if not _held:
        _stop.clear()
        threading.Thread(target=_beat, daemon=True, name="lock").start()
    _held[path] = mine


def check(path: Path, what: str) -> bool:
    """Raise UserError naming the holder where another living process has the lock file ``path``; without taking it.

    Returns whether there is a lock, of a process that is dead.
    """
    found = holder(path)
    if found is not None and alive(found[0], myself(), found[1]):
        raise UserError(_refusal(what, *found, path))
    return found is not None


def holder(path: Path) -> tuple[dict[str, Any], float] | None:
    """What the lock file ``path`` says of its holder ({}: it is being written), and seconds since its last sign of
    life; None where there is no lock."""
    try:
        found, silent = json.loads(path.read_text(encoding="utf-8")), time.time() - path.stat().st_mtime
    except FileNotFoundError:  # released just now
        return None
    except ValueError:  # cut short as it was written
        found, silent = {}, time.time() - path.stat().st_mtime
    return (found if isinstance(found, dict) and found.keys() >= myself().keys() else {}), silent


def release() -> None:
    """Give up every lock of this process."""
    _stop.set()
    for path, mine in list(_held.items()):
        del _held[path]
        with suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")) == mine:
                path.unlink()


def myself() -> dict[str, Any]:
    """What a lock says of its holder."""
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["distill", *sys.argv[1:]]),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def alive(holder: dict[str, Any], mine: dict[str, Any], silent: float) -> bool:
    """Whether the holder of a lock lives, as seen from ``mine`` after ``silent`` seconds without a heartbeat."""
    if holder.get("job") and holder["job"] == mine["job"] and holder["restart"] < mine["restart"]:
        return False  # SLURM starts a job again only once it is dead
    if not holder or (holder["host"], holder["machine"]) != (mine["host"], mine["machine"]):
        return silent < STALE
    return started(holder["pid"]) == holder["started"]


def started(pid: int) -> str | None:
    """When a process of this machine began, as the system counts; None where there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # a system without /proc: a number that is used again cannot be told
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return "unknown"
    return None if fields[0] == "Z" else fields[19]


def _machine() -> str:
    """What tells apart two machines, two containers or two boots of one host name."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _write_new(path: Path, mine: dict[str, Any]) -> bool:
    """Create the lock file; False where there is one."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(mine))
    except OSError:  # an empty file would be taken for the lock of one that is about to write it
        path.unlink()
        raise
    return True


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """One process of this machine at a time judges a lock and takes it: two could else both find it dead."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _beat() -> None:
    """Touch the locks; end the process where another took one over (after a suspension, say), as a kill would."""
    while not _stop.wait(HEARTBEAT):
        for path, mine in list(_held.items()):
            with suppress(OSError, ValueError):
                if json.loads(path.read_text(encoding="utf-8")) != mine and path in _held:
                    os.write(2, f"\n{path} was taken over by another process while this one slept\n".encode())
                    os._exit(2)
                os.utime(path)


def _refusal(what: str, holder: dict[str, Any], silent: float, path: Path) -> str:
    if not holder:
        return f"{what} is being taken by another process right now: try again (or remove {path})"
    host, pid = holder["host"], holder["pid"]
    return (
        f"{what} is in use: host {host}, pid {pid}, since {holder['since']}\n"
        f"  by: {holder['command']} (last sign of life {max(silent, 0):.0f} s ago)\n"
        f"wait for it, stop it (on {host}: kill {pid}), or take another folder; were that machine gone, its lock "
        f"would be taken over {STALE:.0f} s after its last sign of life"
    )
