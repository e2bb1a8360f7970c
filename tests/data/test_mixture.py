"""Mixtures: shares, determinism, held-out parts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import DataConfig, SourceConfig
from distill.data.mixture import (
    check_data,
    check_options,
    counts,
    counts_record,
    describe,
    describe_rows,
    describe_survey,
    draw_sources,
    load_data,
)
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import load_rows
from distill.errors import UserError

TOKENIZER = build_tokenizer()


def numbered(folder: Path, name: str, word: str, count: int = 160) -> str:
    """A file of ``count`` documents ``WORD 0000``, and so on."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{word} {i:04d}", "completion": "7"} for i in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Embedded, ``x`` and ``y``, by 1 to 2 to 1; a row of a file holds one document."""
    sources = ["embedded", numbered(tmp_path, "x.jsonl", "x"), numbered(tmp_path, "y.jsonl", "y")]
    mixture = [SourceConfig(source, weight) for source, weight in zip(sources, (1.0, 2.0, 1.0), strict=True)]
    return DataConfig(sequence_length=64, mixture=mixture)


def texts(rows: Any) -> list[str]:
    return [TOKENIZER.decode(rows[i]["input_ids"], skip_special_tokens=True) for i in range(len(rows))]


def kinds(rows: Any) -> list[str]:
    return [text[0] if text[0] in "xy" else "embedded" for text in texts(rows)]


def test_weights_are_shares_of_rows(data: DataConfig) -> None:
    found = kinds(load_data(data, TOKENIZER, 600, 0))
    assert abs(found.count("embedded") / 600 - 0.25) < 0.05
    assert abs(found.count("x") / 600 - 0.5) < 0.05
    assert found[:20] != sorted(found[:20]), "sources alternate"


def test_a_row_does_not_depend_on_how_many_there_are(data: DataConfig) -> None:
    few, many = load_data(data, TOKENIZER, 9, 3), load_data(data, TOKENIZER, 500, 3)
    for i in (8, 0, 5, 3):
        assert all(torch.equal(few[i][name], many[i][name]) for name in few[i])
    assert draw_sources([1, 2], 7, 0) == draw_sources([1, 2], 70, 0)[:7]


def test_the_seed_decides(data: DataConfig) -> None:
    one, same, other = (kinds(load_data(data, TOKENIZER, 60, seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_source_gives_its_rows_in_its_own_order(data: DataConfig) -> None:
    """Nothing is left out or seen twice before a file is through; rows are those of the source alone."""
    rows = load_data(data, TOKENIZER, 300, 5)
    for part, kind in enumerate(("embedded", "x", "y")):
        mine = [text for text, found in zip(texts(rows), kinds(rows), strict=True) if found == kind]
        alone = load_rows(data.mixture[part], data, TOKENIZER, len(mine), 5)
        assert mine == texts(alone)


def test_held_out_rows_have_the_same_shares_of_the_other_side(data: DataConfig) -> None:
    rows = load_data(data, TOKENIZER, 200, 0, held_out=True)
    found = kinds(rows)
    assert abs(found.count("x") / 200 - 0.5) < 0.1
    documents = lambda rows: set(re.findall(r"[xy] \d{4}", " ".join(texts(rows))))  # noqa: E731
    seen, trained = documents(rows), documents(load_data(data, TOKENIZER, 400, 0))
    assert len(seen) > 2
    assert not seen & trained


def test_weight_zero_leaves_a_source_out(data: DataConfig) -> None:
    data.mixture[1].weight = 0.0
    assert set(kinds(load_data(data, TOKENIZER, 50, 0))) == {"embedded", "y"}


def test_a_source_too_rare_to_be_drawn_is_no_error(data: DataConfig) -> None:
    data.mixture[2].weight = 1e-9
    assert "y" not in kinds(load_data(data, TOKENIZER, 20, 0))


def test_without_a_mixture_the_source_is_taken(data: DataConfig) -> None:
    alone = DataConfig(source=data.mixture[1].source, sequence_length=64)
    assert set(kinds(load_data(alone, TOKENIZER, 10, 0))) == {"x"}
    assert (describe(alone), describe(DataConfig())) == (alone.source, "embedded")
    assert describe(data).startswith("25% embedded, 50% ")


def test_rows_end_where_they_should(data: DataConfig) -> None:
    rows = load_data(data, TOKENIZER, 3, 0)
    assert len(list(rows)) == 3  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([("embedded", -1)], r"data\.mixture\[0\]\.weight=-1 must be at least 0"),
        ([("embedded", 1), ("{tmp}/x.jsonl", float("nan"))], r"data\.mixture\[1\]\.weight=nan"),
        ([("embedded", float("inf"))], r"data\.mixture\[0\]\.weight=inf"),
        ([("embedded", 0)], "a weight above 0"),
        ([("embedded", 1), ("{tmp}/xx.jsonl", 1)], r"data\.mixture\[1\]\.source: no such file.*mean '.*/x\.jsonl'"),
        ([("embeded", 1)], r"no such file: embeded \(did you mean 'embedded'\?\)"),
        ([("{tmp}/x.jsonl", 1), ("{tmp}/../{name}/x.jsonl", 1)], r"is data\.mixture\[0\], too"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path: Path, mixture: list[tuple[str, float]], message: str) -> None:
    numbered(tmp_path, "x.jsonl", "x")
    entries = [SourceConfig(s.replace("{tmp}", str(tmp_path)).replace("{name}", tmp_path.name), w) for s, w in mixture]
    with pytest.raises(UserError, match=message):
        check_data(DataConfig(mixture=entries))


def test_a_streamed_mixture_has_the_rows_of_one_in_memory(data: DataConfig) -> None:
    a, b = (load_data(dataclasses.replace(data, streaming=streaming), TOKENIZER, 120, 4) for streaming in (False, True))
    assert all(torch.equal(a[i][name], b[i][name]) for i in range(120) for name in a[i])
    resumed = load_data(dataclasses.replace(data, streaming=True), TOKENIZER, 120, 4)
    assert all(torch.equal(resumed[i][name], a[i][name]) for i in (0, *range(77, 120)) for name in a[i])


def test_each_source_has_its_own_columns_and_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        numbered(tmp_path / "folder", f"{split}.jsonl", split[:1])
    (tmp_path / "other.csv").write_text("q,a\n" + "".join(f"c {i:04d},7\n" for i in range(160)))
    folder = str(tmp_path / "folder")
    mixture = [
        SourceConfig(folder),
        SourceConfig(folder, split="test"),
        SourceConfig(str(tmp_path / "other.csv"), columns={"prompt": "q", "completion": "a"}),
    ]
    config = DataConfig(sequence_length=20, mixture=mixture)
    check_data(config, build_tokenizer)
    rows = load_data(config, TOKENIZER, 60, 0)
    found = [text[:1] for text in texts(rows)]
    assert {found.count(kind) > 10 for kind in "tc"} == {True}
    assert list(counts(config, rows)) == [folder, f"{folder} (test)", str(tmp_path / "other.csv")]
    assert [line.split(":")[0] for line in describe_survey(config, build_tokenizer)] == list(counts(config, rows))


def test_a_stream_is_described_by_its_first_documents(data: DataConfig) -> None:
    rows = load_data(data, TOKENIZER, 20, 0)
    assert [line.split(":")[0] for line in describe_rows(data, rows, TOKENIZER)] == list(counts(data, rows))
    data.streaming = True
    lines = describe_rows(data, load_data(data, TOKENIZER, 20, 0), TOKENIZER)
    assert len(lines) == 2 and all(": first 160 documents read; " in line for line in lines)


def test_counts_are_kept_for_the_record(data: DataConfig) -> None:
    record = counts_record(data, load_data(data, TOKENIZER, 50, 0))
    assert list(record) == [entry.source for entry in data.mixture]
    assert all(part["rows"] > 0 and part["targets"] > 0 for part in record.values())
    assert json.loads(json.dumps(record)) == record


def test_data_are_checked_before_any_work(tmp_path: Path) -> None:
    """The first rows are read, and what they hold is tokenised; a tokenizer is asked for only if one is needed."""
    path = Path(numbered(tmp_path, "x.jsonl", "x"))
    check_data(DataConfig(source=str(path)), build_tokenizer)
    check_data(DataConfig(), lambda: pytest.fail("no tokenizer is needed"))
    path.write_text(path.read_text() + '{"promt": 1}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:161: needs messages"):
        check_data(DataConfig(source=str(path)))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text((json.dumps(chat) + "\n") * 3)
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*no chat template"):
        check_data(DataConfig(source=str(path)), lambda: bare)
    path.write_text((json.dumps({"prompt": "1" * 40, "completion": "2"}) + "\n") * 3)
    for too_long, message in (("cut", "no completion tokens within"), ("drop", "all documents are longer than")):
        with pytest.raises(UserError, match=f"{message} data.sequence_length=32"):
            check_data(DataConfig(source=str(path), sequence_length=32, too_long=too_long), build_tokenizer)
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(UserError, match="at least 2 documents"):
        check_data(DataConfig(source=str(path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "assistent"}, r"unknown data\.mask 'assistent' \(did you mean 'assistant'\?\)"),
        ({"too_long": "crop"}, r"unknown data\.too_long 'crop' .*; allowed: cut, drop, split"),
        ({"sequence_length": 0}, r"data\.sequence_length=0 must be above 0"),
        ({"shuffle_buffer": 0}, r"data\.shuffle_buffer=0 must be above 0"),
        ({"columns": {"promt": "q"}}, r"unknown column 'promt' in data\.columns"),
        ({"mixture": [SourceConfig("embedded", columns={"txt": "q"})]}, r"'txt' in data\.mixture\[0\]\.columns"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(DataConfig(**options))
