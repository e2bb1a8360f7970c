"""Sources: every form gives the same rows, each named; what cannot be read; the hub by a stand-in, nothing cached."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest

from distill.config import Origin
from distill.data import sources
from distill.data.sources import check_place, files, hub_revision, is_hub, read
from distill.errors import UserError

ROWS = [{"prompt": f"sort {i}1", "completion": f'<think>1 1{i}</think>\n0{i}, "é"'} for i in range(7)]
SHA = "0123456789" * 4


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(jsonl(ROWS).encode()))


def write_shards(path: Path) -> None:
    (path / "more").mkdir(parents=True)
    (path / "a.jsonl").write_text(jsonl(ROWS[:2]))
    pd.DataFrame(ROWS[2:3]).to_parquet(path / "b.parquet")
    write_gz(path / "more" / "c.jsonl.gz")
    (path / "more" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[3:5]).encode()))
    pd.DataFrame(ROWS[5:]).to_csv(path / "more" / "d.csv", index=False)
    (path / "notes.json").write_text("[]")


def write_splits(path: Path) -> None:
    path.mkdir()
    for name, rows in (("train-0", ROWS[:4]), ("train-1", ROWS[4:]), ("test-0", ROWS[:1])):
        pd.DataFrame(rows).to_parquet(path / f"{name}.parquet")


def saved(rows: list[Any]) -> Any:
    return datasets.Dataset.from_list(rows)


FORMS: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda path: path.write_text("\ufeff" + jsonl(ROWS), encoding="utf-8"),
    "d.jsonl.gz": write_gz,
    "d.json": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(jsonl(ROWS)),
    "d.parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "d.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "shards": write_shards,
    "splits": write_splits,
    "saved": lambda path: saved(ROWS).save_to_disk(path),
    "dict": lambda path: datasets.DatasetDict(train=saved(ROWS), test=saved(ROWS[:1])).save_to_disk(path),
}


def write(folder: Path, form: str) -> Origin:
    FORMS[form](folder / form)
    return Origin(source=str(folder / form))


def listed(origin: Origin, **options: Any) -> list[Any]:
    return [row for _, row in read(origin, **options)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text stays text (``03`` is no number), in order, and nothing is copied to a cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    origin = write(tmp_path, form)
    before = sorted(tmp_path.rglob("*"))
    check_place(origin, "data.source")
    assert listed(origin) == listed(origin, streaming=True) == ROWS
    assert sorted(tmp_path.rglob("*")) == before
    assert len({where for where, _ in read(origin)}) == len(ROWS), "each row has a place of its own"
    assert all(str(tmp_path / form) in where for where, _ in read(origin))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
        ("a.json", b'[{"a": 1}, ', r"a\.json: not JSON"),
        ("a.json", b"[" * 100_000, r"a\.json: not JSON"),
        ("a.csv", b"prompt,completion\na,b\nc\n", r"a\.csv:3: a row of 1 cells under a header of 2"),
        ("a.csv", b"prompt,completion\na,b,c\n", r"a\.csv:2: a row of 3 cells under a header of 2"),
        ("a.csv", b'prompt,completion\n"a\nb"x,c\n', r"a\.csv:3: not CSV"),
        ("a.csv", b'prompt,completion\na,"b\n', r"a\.csv:2: not CSV"),
        ("a.csv", b"prompt\n\xff\n", r"a\.csv cannot be read"),
        ("a.parquet", b"PAR1 nothing of the kind", r"a\.parquet cannot be read as Parquet"),
        ("a.parquet", b"", r"a\.parquet cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read(Origin(source=str(tmp_path / name))))
    assert len(str(caught.value).splitlines()) <= 5


def test_a_torn_parquet_file_is_named(tmp_path: Path) -> None:
    origin = write(tmp_path, "d.parquet")
    path = Path(origin.source)
    whole = bytearray(path.read_bytes())
    whole[4:60] = b"\xff" * 56
    path.write_bytes(bytes(whole))
    with pytest.raises(UserError, match=r"d\.parquet cannot be read as Parquet"):
        list(read(origin))


def test_a_torn_saved_data_set_is_named(tmp_path: Path) -> None:
    origin = write(tmp_path, "saved")
    for path in Path(origin.source).glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="saved cannot be read as a saved data set"):
        list(read(origin))


@pytest.mark.parametrize("form", ["splits", "dict"])
def test_a_split_is_chosen_or_refused(tmp_path: Path, form: str) -> None:
    origin = write(tmp_path, form)
    origin.split = "test"
    assert listed(origin) == ROWS[:1]
    origin.split = "tset"
    with pytest.raises(UserError, match=r"no split 'tset' in .*; it has (test, train|train, test)"):
        check_place(origin, "data.source")
        list(read(origin))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name-2.0_x", True),
        ("here/none", False),  # the folder exists: a path that is wrong
        ("owner/traces.jsonl", False),
        ("owner/a.parquet", False),
        ("name", False),
        ("a/b/c", False),
        ("./owner", False),
        ("/owner/name", False),
        ("~/name", False),
        ("embedded", False),
    ],
)
def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub(source) is expected
    if expected:
        check_place(Origin(source=source), "data.source")
    elif source != "embedded":
        with pytest.raises(UserError, match="no such file"):
            check_place(Origin(source=source), "data.source")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"sft\.source: no data in the folder .*no \.jsonl"):
        check_place(Origin(source=str(tmp_path)), "sft.source")


def test_the_files_of_a_source(tmp_path: Path) -> None:
    assert [path.name for path in files(write(tmp_path, "d.csv"))] == ["d.csv"]
    assert [path.name for path in files(write(tmp_path, "splits"))] == ["train-0.parquet", "train-1.parquet"]
    assert "state.json" in [path.name for path in files(write(tmp_path, "saved"))]
    assert files(Origin(source="embedded")) == files(Origin(source="owner/name")) == []


class Hub:
    """A stand-in for the hub: what it was asked, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error
        monkeypatch.setattr(sources, "HfApi", lambda: self)
        monkeypatch.setattr(sources.datasets, "load_dataset", self.load_dataset)

    def dataset_info(self, name: str, revision: str | None) -> Any:
        self.asked.append((name, revision))
        if self.error:
            raise self.error
        return SimpleNamespace(sha=SHA)

    def load_dataset(self, *args: Any, **options: Any) -> Any:
        self.asked.append((args, options))
        if self.error:
            raise self.error
        return saved(ROWS).to_iterable_dataset() if options["streaming"] else saved(ROWS)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_is_asked_for_by_its_commit(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    hub = Hub(monkeypatch)
    origin = Origin(source="owner/name", subset="easy", split="test", revision="v2")
    assert listed(origin, streaming=streaming) == ROWS
    wanted = {"split": "test", "revision": SHA, "streaming": streaming}
    assert hub.asked == [("owner/name", "v2"), (("owner/name", "easy"), wanted)]
    places = [where for where, _ in read(Origin(source="owner/name"), streaming=streaming)]
    assert places[:2] == ["owner/name row 1", "owner/name row 2"]
    assert hub.asked[2] == ("owner/name", None)
    assert hub.asked[3][0] == ("owner/name", None)


@pytest.mark.parametrize("revision", ["", SHA])
def test_without_a_network_the_message_is_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, revision: str) -> None:
    Hub(monkeypatch, ConnectionError("cannot resolve huggingface.co\nand forty lines more"))
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'owner/name' .*cannot be had from the hub: cannot resolve") as caught:
        listed(Origin(source="owner/name", revision=revision))
    assert len(str(caught.value).splitlines()) == 2
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


def test_the_cache_knows_the_commit_when_the_hub_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Hub(monkeypatch, ConnectionError("offline"))
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "datasets--owner--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(SHA + "\n")
    assert hub_revision(Origin(source="owner/name")) == SHA
    (reference.parents[1] / "snapshots" / SHA).mkdir(parents=True)
    assert hub_revision(Origin(source="owner/name", revision=SHA)) == SHA
    shutil.rmtree(tmp_path / "datasets--owner--name")
    with pytest.raises(UserError, match="offline"):
        hub_revision(Origin(source="owner/name"))
