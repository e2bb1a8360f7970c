"""Mixtures: shares, determinism, held-out parts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import DataConfig, SourceConfig
from distill.data.mixture import check_data, describe, draw_sources, load_data
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import load_rows
from distill.errors import UserError

TOKENIZER = build_tokenizer()


def numbered(folder: Path, name: str, word: str, count: int = 160) -> str:
    """A file of ``count`` documents ``WORD 0000``, and so on."""
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
