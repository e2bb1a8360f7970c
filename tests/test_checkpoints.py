"""The newest good checkpoint of a training is found and named; old ones go, the last good one never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.checkpoints import MANIFEST, checkpoints_of, fault, newest_good, prune, seal


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        (path / "inner").mkdir(parents=True)
        (path / "model.safetensors").write_bytes(bytes([step]) * 100)
        (path / "inner" / "optimizer.pt").write_bytes(bytes([step]) * 300)
        seal(path)


def test_newest_first_by_number(tmp_path: Path) -> None:
    make(tmp_path, 2, 10, 9)
    (tmp_path / "partial" / "checkpoint-12").mkdir(parents=True)
    (tmp_path / "checkpoint-x").mkdir()
    assert list(checkpoints_of(tmp_path)) == [10, 9, 2]
    assert checkpoints_of(tmp_path / "nowhere") == {}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda c: (c / "model.safetensors").write_bytes(b"\6" * 50), "model.safetensors has 50 bytes in place"),
    "flipped": (lambda c: flip(c / "inner" / "optimizer.pt"), "optimizer.pt is damaged: its checksum is another"),
    "lost": (lambda c: (c / "inner" / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), f"has no whole {MANIFEST}"),
    "torn manifest": (lambda c: (c / MANIFEST).write_text('{"files": {'), f"has no whole {MANIFEST}"),
    "odd manifest": (lambda c: (c / MANIFEST).write_text('{"files": {"a": 3}}'), f"has no whole {MANIFEST}"),
    "list manifest": (lambda c: (c / MANIFEST).write_text("[]"), f"has no whole {MANIFEST}"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, harm: str) -> None:
    make(tmp_path, 2, 4, 6)
    do, message = HARMS[harm]
    if harm == "odd manifest":
        (tmp_path / "checkpoint-6" / "a").touch()
    do(tmp_path / "checkpoint-6")
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == tmp_path / "checkpoint-4"
    assert said == [
        f"{tmp_path / 'checkpoint-6'} is passed over: {said[0].split(': ', 1)[1]}",
        f"continuing from {tmp_path / 'checkpoint-4'}",
    ]
    assert message in said[0]
    assert fault(tmp_path / "checkpoint-4") is None


def test_none_is_whole(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_good(tmp_path, said.append) is None and said == []
    make(tmp_path, 2)
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    assert newest_good(tmp_path, said.append) is None
    assert said[-1] == "no checkpoint is whole: beginning anew"


def test_old_ones_and_those_passed_over_go(tmp_path: Path) -> None:
    make(tmp_path, 2, 4, 5, 6, 8)
    prune(tmp_path, newest=5, limit=2)
    assert list(checkpoints_of(tmp_path)) == [5, 4]
    prune(tmp_path, newest=5, limit=1)
    assert list(checkpoints_of(tmp_path)) == [5]
    prune(tmp_path, newest=5, limit=3)
    assert list(checkpoints_of(tmp_path)) == [5]
