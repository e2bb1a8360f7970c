"""What data are, for fingerprints: their contents wherever they lie, and nothing that changes goes unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest

from distill.config import DataConfig, Origin, SourceConfig
from stages import identity
from stages.identity import content, data_identity, source_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of one split and one of another."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train-0", "train-1", "test-0"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    return folder


def of(path: Path, **keys: str) -> str:
    return source_identity(Origin(source=str(path), **keys))


def test_a_folder_is_its_files(folder: Path, tmp_path: Path) -> None:
    first = of(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == first, "wherever it lies"
    (folder / "test-0.jsonl").write_text("{}")
    (folder / "README.md").write_text("notes")
    assert of(folder) == first, "what is not read does not count"
    assert of(folder, split="test") != first
    (folder / "train-2.jsonl").write_text("{}")
    added = of(folder)
    (folder / "train-2.jsonl").rename(folder / "train-00.jsonl")
    assert len({first, added, of(folder)}) == 3, "the order of the files decides the rows"
    (folder / "train-1.jsonl").write_text('{"text": "other"}')
    assert of(folder) not in (first, added)


def test_a_large_file_is_read_in_blocks(tmp_path: Path) -> None:
    """The begin, the end and the size count whatever the number of blocks; a small file counts as a whole."""
    path = tmp_path / "large"
    whole = bytearray(5 << 20)
    path.write_bytes(whole)
    first = content(path, 2)
    for place, seen in ((0, True), (len(whole) - 1, True), (len(whole) // 2, False)):
        whole[place] = 1
        path.write_bytes(whole)
        assert (content(path, 2) != first) is seen
        assert content(path) != content(path, 2)
        whole[place] = 0
    path.write_bytes(whole + b"\0")
    assert content(path, 2) != first


def test_a_saved_data_set_is_its_files(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    first = of(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-1] + b"x")
    assert of(tmp_path / "saved") != first


def test_a_hub_data_set_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "hub_revision", lambda origin: f"sha of {origin.revision or 'main'}")
    assert source_identity(Origin(source="owner/name")) == "commit sha of main"
    assert source_identity(Origin(source="owner/name", revision="v2")) == "commit sha of v2"


def test_the_sources_of_a_mixture(folder: Path) -> None:
    mixture = [SourceConfig("embedded"), SourceConfig(str(folder)), SourceConfig(str(folder), split="test")]
    found = data_identity(DataConfig(mixture=mixture))
    assert found == {"embedded": "embedded", str(folder): of(folder), f"{folder} (test)": of(folder, split="test")}
    assert data_identity(DataConfig(source=str(folder))) == of(folder)
