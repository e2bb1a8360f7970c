"""Scoring as a step: cut short and gone on with, a list of candidates, several scores compared, what stops it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from distill.importance import Setup, mmr
from distill.likelihood import Requests
from stages.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def unscored(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """``unscored()``: a copy of the finished run in which only the first ``stages`` have been worked on."""

    def make(name: str = "run", stages: int = 1) -> Path:
        run = Path(shutil.copytree(tiny / "run", tmp_path / name))
        for folder in sorted(run.glob("stages/*"))[stages:]:
            for step in folder.iterdir():
                shutil.rmtree(step)
        return run

    return make


def scores(run: Path, stage: int = 2) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(run.glob(f"stages/{stage:02d}-*/score/scores.json")).read_text())
    return found


@pytest.mark.parametrize("options", [[], ["score.mmr.trainable=mixer", "score.mmr.candidates_at_once=1"]])
def test_mmr_that_was_cut_short_goes_on_with_the_blocks_that_are_left(
    options: list[str], unscored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run, other = unscored(), unscored("other")
    assert main(["score", str(run), "--stage", "2", *options]) == 0
    take, given = mmr.score, list[list[int]]()

    def cut(setup: Setup) -> dict[str, Any]:
        def report(block: int, row: dict[str, float]) -> None:
            setup.report(block, row)
            if len(given) == 1:
                raise KeyboardInterrupt

        given.append(list(setup.blocks))
        return take(replace(setup, report=report))

    monkeypatch.setattr(mmr, "score", cut)
    command = ["score", str(other), "--stage", "2", *options]
    assert main(command) == 130
    capsys.readouterr()
    assert main(command) == 0
    assert "1 of 2 candidates are scored already" in capsys.readouterr().out
    assert given[0] == given[0][:1] + given[1]
    assert scores(other) == scores(run)
    assert sorted(path.name for path in next(other.glob("stages/02-*/score")).iterdir()) == [
        "importance.parquet", "scores.json", "step.json",
    ]  # fmt: skip


def test_loo_that_was_cut_short_goes_on_with_the_batches_that_are_left(
    unscored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = unscored(stages=0), unscored("other", stages=0)
    monkeypatch.setattr(Requests, "compare", partialmethod(Requests.compare, batch_tokens=64))
    assert main(["score", str(run)]) == 0
    once, batches = Requests._score, list[int]()

    def cut(model: Any, batch: Any) -> list[float]:
        batches.append(len(batch))
        if len(batches) == 6:  # the second batch's second variant
            raise KeyboardInterrupt
        return once(model, batch)

    monkeypatch.setattr(Requests, "_score", staticmethod(cut))
    assert main(["score", str(other)]) == 130
    (journal,) = other.glob("stages/01-*/score.partial/scratch/*/values.jsonl")
    journal.write_text(journal.read_text() + "[4, [[1.0")  # what a kill in the middle of a line leaves
    first = len(batches)
    assert main(["score", str(other)]) == 0
    assert scores(other, 1) == scores(run, 1)
    second = len(batches)
    assert main(["score", str(run), "--stage", "1", "--force"]) == 0
    assert len(batches) - second == second - first + 4, (
        "the first batch of the baseline and three blocks was not computed again"
    )


def test_a_list_of_candidates_and_scores_compared(unscored: Callable[..., Path], capsys: Capture) -> None:
    run = unscored(stages=0)
    options = ["score.blocks=[2,0]", "score.compare=[mmr trainable=mixer,mmr trainable=block steps=2]"]
    assert main(["score", str(run), *options]) == 0
    said = capsys.readouterr().out
    assert "warning: 4 questions rank blocks poorly; at least 500 are wanted" in said
    assert "mmr trainable=mixer: rank correlation" in said
    found = scores(run, 1)
    assert [row["block"] for row in found["blocks"]] == [0, 2] and sorted(found["order"]) == [0, 2]
    names = ["mmr trainable=mixer", "mmr trainable=block steps=2"]
    assert [each["scorer"] for each in found["compared"]] == names
    for each in found["compared"]:
        same = each["order"] == found["order"]
        assert each["spearman"] == (1.0 if same else -1.0) and each["same_choice"] == int(same)
        assert sorted(row["block"] for row in each["blocks"]) == [0, 2]
    frame = pd.read_parquet(next(run.glob("stages/01-*/score/importance.parquet")))
    assert list(frame.columns[:6]) == ["scorer", "decides", "block", "score", "rank", "chosen"]
    assert {"stderr", "loglikelihood", "loss_start", "loss_end"} <= set(frame.columns)
    assert list(frame["scorer"]) == ["loo", "loo", *[name for name in names for _ in range(2)]]
    assert list(frame["decides"]) == [True] * 2 + [False] * 4
    for _, rows in frame.groupby("scorer"):
        assert sorted(rows["rank"]) == [1, 2] and list(rows["chosen"]) == list(rows["rank"] == 1)
    assert main(["place", str(run), "--stage", "1", *options]) == 0
    placed = json.loads(next(run.glob("stages/01-*/place/placement.json")).read_text())
    assert placed["added"] == found["order"][:1]


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "has score nan, so that its rank would be arbitrary"), (0.5, "the same score")]
)
def test_a_metric_that_ranks_nothing_stops_before_the_swap(
    value: float, message: str, unscored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    figures = {"accuracy": value, "stderr": 0.0, "loglikelihood": -1.0, "questions": 4.0}
    monkeypatch.setattr(Requests, "compare", lambda self, model, variants, **_: [figures for _ in variants])
    run = unscored(stages=0)
    assert main(["run", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not list(run.glob("stages/01-*/place*")) and not list(run.glob("stages/01-*/score"))


def test_a_candidate_whose_score_is_not_finite_is_named(
    unscored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(mmr, "loss_of", lambda setup, model: math.inf)
    run = unscored()
    assert main(["score", str(run), "--stage", "2", "--candidate", "0"]) == 2
    assert re.search("mmr: block . has score inf", capsys.readouterr().err)
    assert not list(run.glob("stages/02-*/score.partial/candidates/*.json"))


def test_what_is_scored_together_takes_no_single_candidate(unscored: Callable[..., Path], capsys: Capture) -> None:
    run = unscored()
    options = ["score.mmr.halving=true", "score.mmr.steps=4"]
    assert main(["score", str(run), "--stage", "2", "--candidate", "0", *options]) == 2
    assert "mmr scores its candidates together: leave out --candidate" in capsys.readouterr().err
    assert main(["score", str(run), "--stage", "2", *options]) == 0
    assert "halving ran 5 of 8 steps (38% saved)" in capsys.readouterr().out
    assert scores(run)["halving"]["saved"] == 0.375
