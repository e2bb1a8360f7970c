"""One process at a time on a folder, and locks whose holder is dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import lock
from distill.errors import UserError


@pytest.fixture(autouse=True)
def given_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield
    lock.release()


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def held_by(path: Path, silent: float = 0.0, **changes: Any) -> None:
    """A lock file as another process would leave it, ``silent`` seconds after its last sign of life."""
    path.write_text(json.dumps({**lock.myself(), **changes}))
    os.utime(path, (time.time() - silent,) * 2)


def test_taken_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock.hold(path, "it")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.hold(path, "it")
    lock.release()
    assert not path.exists()
    lock.hold(path, "it")


def test_a_living_holder_is_named(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "run.lock"
    held_by(path, pid=other.pid, started=lock.started(other.pid), since="yesterday", command="distill run demo")
    with pytest.raises(UserError) as caught:
        lock.hold(path, "runs/demo")
    message = str(caught.value)
    for part in (
        "runs/demo is in use",
        lock.myself()["host"],
        f"pid {other.pid}",
        "since yesterday",
        "distill run demo",
    ):
        assert part in message
    assert message.count("\n") <= 4
    assert json.loads(path.read_text())["pid"] == other.pid
    other.kill()
    other.wait()
    lock.hold(path, "runs/demo")
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_zombie_is_dead(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    began = lock.started(other.pid)
    assert began is not None
    other.kill()
    deadline = time.monotonic() + 10
    while lock.started(other.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.started(other.pid) is None


def test_a_process_number_used_again_is_another_process(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    held_by(tmp_path / "run.lock", pid=other.pid, started="1")
    lock.hold(tmp_path / "run.lock", "it")


def test_a_holder_elsewhere_counts_as_dead_without_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    held_by(path, host="node7", silent=lock.STALE - 10)
    with pytest.raises(UserError, match="node7.*\n.*last sign of life 110 s ago"):
        lock.hold(path, "it")
    held_by(path, host="node7", silent=lock.STALE + 10)
    lock.hold(path, "it")


def test_a_host_name_on_another_boot_is_judged_by_heartbeat(tmp_path: Path) -> None:
    held_by(tmp_path / "run.lock", machine="another boot", pid=1)
    with pytest.raises(UserError, match="is in use"):
        lock.hold(tmp_path / "run.lock", "it")


def test_a_requeued_job_takes_over_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    held_by(path, host="node7", job="77", restart=0)
    with pytest.raises(UserError, match="node7"):  # two processes of one start
        lock.hold(path, "it")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_by(path, host="node7", job="78", restart=0)
    with pytest.raises(UserError, match="node7"):
        lock.hold(path, "it")
    held_by(path, host="node7", job="77", restart=0)
    lock.hold(path, "it")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_a_torn_lock_is_taken_over_in_time(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)
    with pytest.raises(UserError, match="try again"):
        lock.hold(path, "it")
    os.utime(path, (time.time() - lock.STALE - 1,) * 2)
    lock.hold(path, "it")


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    path = tmp_path / "run.lock"
    lock.hold(path, "it")
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 10


def test_a_lock_of_another_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock.hold(path, "it")
    held_by(path, pid=1)
    lock.release()
    assert path.exists()


def test_of_many_at_once_one_gets_a_dead_ones_lock(tmp_path: Path) -> None:
    """Eight processes find the same stale lock: one takes it, seven name that one."""
    held_by(tmp_path / "run.lock", started="1")
    code = (
        "import sys, types, time, importlib.util as u\n"
        "from pathlib import Path\n"
        "sys.modules['distill'] = types.ModuleType('distill')\n"  # spares the import of torch
        "for name in ('errors', 'lock'):\n"
        "    spec = u.spec_from_file_location('distill.' + name, sys.argv[1] + f'/{name}.py')\n"
        "    module = sys.modules['distill.' + name] = u.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    module.hold(Path(sys.argv[2]), 'it')\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        "except module.UserError as error:\n"
        "    print('in use' if 'is in use' in str(error) or 'try again' in str(error) else error, flush=True)\n"
    )
    source = str(Path(lock.__file__).parent)
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code, source, str(tmp_path / "run.lock")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for _ in range(8)
    ]  # fmt: skip
    for process in many:
        assert process.stdin is not None
        process.stdin.write("\n")
    said = [process.stdout.readline().strip() for process in many if process.stdout is not None]
    for process in many:
        process.communicate("\n")
    assert sorted(said) == ["held"] + ["in use"] * 7


def test_a_lock_that_found_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file would keep the next process away, which finds room."""

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full)
        with pytest.raises(OSError, match="No space left"):
            lock.hold(tmp_path / "run.lock", "it")
    assert not any(tmp_path.iterdir())
    lock.hold(tmp_path / "run.lock", "it")
