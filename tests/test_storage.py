"""Folders that appear whole or not at all, checksums, and every way in which a full disk shows itself."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill import storage
from distill.errors import UserError
from distill.storage import DiskFull, checksums, damage, fresh_folder, full_disk_named, new_folder, no_room, sync_tree


def fill(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "inner" / "b.txt").write_text("b")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").touch()
    (tmp_path / "partial" / "of a killed process").mkdir(parents=True)
    with new_folder(target) as partial:
        fill(partial)
        assert (target / "old").exists(), "what is there stands until the new one is whole"
        assert partial.name == target.name and not (partial.parent / "of a killed process").exists()
    assert sorted(path.name for path in target.rglob("*")) == ["a.bin", "b.txt", "inner"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    fill(target)
    with pytest.raises(KeyboardInterrupt), new_folder(target) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not damage(target, checksums(target))


def test_all_is_synced_before_the_rename_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched(handle: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renamed)
    with new_folder(tmp_path / "new") as partial:
        fill(partial)
    inside = [str(partial / name) for name in ("inner/b.txt", "inner", "a.bin", "")]
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert sorted(before) == sorted(path.rstrip("/") for path in inside)
    assert before[-1] == str(partial)
    assert after == [str(tmp_path)]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 2,303 bytes in place of 2,304"),
        (lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]), "is damaged: its checksum is another"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    fill(tmp_path)
    noted = checksums(tmp_path)
    assert list(noted) == ["a.bin", "inner/b.txt"]
    assert checksums(tmp_path, skip=("inner",)).keys() == {"a.bin"}
    assert damage(tmp_path, noted) is None
    harm(tmp_path / "a.bin")
    os.utime(tmp_path / "a.bin", (1, 1)) if (tmp_path / "a.bin").exists() else None
    assert damage(tmp_path, noted) == (tmp_path / "a.bin", message)


def test_what_was_found_whole_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    noted = checksums(tmp_path)
    assert damage(tmp_path, noted) is None
    monkeypatch.setattr(storage, "_digest", lambda path: pytest.fail(f"{path} is read again"))
    assert damage(tmp_path, noted) is None


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may grow beyond 1 MiB: a real refusal of the system, that needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


TENSORS = {"a": torch.zeros(1 << 20)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "write": lambda path: path.write_bytes(bytes(1 << 22)),
    "safetensors": lambda path: save_file(TENSORS, path),
    "torch.save": lambda path: torch.save(TENSORS, path),
    "torch.save at the last bytes": lambda path: torch.save(torch.zeros((1 << 18) - 200), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_without_room_is_one_message(tmp_path: Path, short_files: None, writer: str) -> None:
    with pytest.raises(DiskFull) as caught, new_folder(tmp_path / "new") as partial:
        WRITERS[writer](partial / "file")
    message = str(caught.value)
    assert f"cannot write to {tmp_path}" in message and "MiB free: too little" in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "what was half written is removed"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_and_quota_are_told_apart(tmp_path: Path, number: int) -> None:
    expected = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}[number]
    with pytest.raises(DiskFull, match=expected), full_disk_named(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "no"), RuntimeError("unexpected"), ValueError("x")):
        with pytest.raises(type(error)), full_disk_named(tmp_path):
            raise error
        assert no_room(error) is None


def test_sync_tree_takes_empty_folders_too(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    (tmp_path / "a" / "empty").mkdir()
    sync_tree(tmp_path / "a")


def test_a_fresh_folder_touches_nothing_of_the_users(tmp_path: Path) -> None:
    precious = tmp_path / ".mine.partial" / "precious"
    precious.parent.mkdir()
    precious.touch()
    with fresh_folder(tmp_path / "mine") as one, fresh_folder(tmp_path / "other") as other:
        assert one != other and one.parent == tmp_path
        (one / "a").touch()
        (other / "b").touch()
    assert precious.is_file() and (tmp_path / "mine" / "a").is_file() and (tmp_path / "other" / "b").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "mine", "other"]
    assert oct((tmp_path / "mine").stat().st_mode) == oct(precious.parent.stat().st_mode)
    for name in ("x" * 300, "nul\0"):
        with pytest.raises(UserError, match="cannot write"), fresh_folder(tmp_path / name):
            pass
