"""Scores by their names in a run: what each reads is made ready, and the blocks that it orders first are placed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from distill.config_merge import load_config
from stages.cli import main
from stages.common import open_run
from stages.context import RunConfig, score_inputs
from stages.score import needs

CASES: dict[str, list[str]] = {
    "uniform": [],
    "given": ["score.given=[1,2]"],
    "recall_drop": ["score.recall_drop.questions=6"],
    "combine": ["score.combine=[last,aligned,loo]", "score.aligned={steps: 1, heldout_tokens: 128}"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_stage_is_placed_by_the_score_that_the_config_names(
    name: str, build: Callable[[list[str]], list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "scored"
    for verb in ("score", "place"):
        assert main(build([verb, "{tiny}/tiny.yaml", f"run_dir={run}", f"score.first={name}", *CASES[name]])) == 0
    stage = run / "stages" / "01-H1-1"
    record: dict[str, Any] = json.loads((stage / "score" / "scores.json").read_text())
    placed = json.loads((stage / "place" / "placement.json").read_text())
    assert record["scorer"] == name and sorted(record["order"]) == [0, 1, 2] and placed["added"] == record["order"][:1]
    assert main(build(["score", "{tiny}/tiny.yaml", f"run_dir={run}", "score.first=last"])) == 2, "another score"
    if name == "combine":
        assert set(record["parts"]) == {"last", "aligned", "loo"} and {"rank_last", "rank_loo"} <= set(
            record["blocks"][0]
        )


@pytest.mark.parametrize("verb", ["score", "place", "run"])
def test_a_table_of_another_teacher_is_refused(
    verb: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight of the teacher is another: its scores are none of this one's, and stay as they are."""
    run, other = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(tiny / "run", run)
    shutil.copytree(tiny / "teacher", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    kept = {path: path.read_bytes() for path in run.rglob("*.json")}
    assert main([verb, str(tiny / "tiny.yaml"), f"run_dir={run}", f"teacher={other}"]) == 2
    assert "was made with other inputs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == kept


def test_what_a_score_does_not_read_is_no_input_of_it(tmp_path: Path, tiny: Path) -> None:
    """So that a run need not be scored again for a key of another score."""
    config = load_config(RunConfig, tiny / "tiny.yaml", ["score.combine=[loo,first]"])
    before = {name: score_inputs(config.score, name) for name in ("loo", "mmr", "uniform", "combine")}
    config.score.mmr.steps, config.score.given = 7, [1]
    after = {name: score_inputs(config.score, name) for name in before}
    assert [name for name in before if before[name] != after[name]] == ["mmr"]
    config.score.loo.questions = 5
    assert score_inputs(config.score, "combine") != after["combine"]
    assert "rows" not in needs(config.score, "combine")


def test_the_options_of_a_score_that_is_compared_are_inputs(tiny: Path, tmp_path: Path) -> None:
    """Rows that were taken with others are not taken for its own."""
    found = set()
    for options in ([], ["score.mmr.steps=7"], ["score.compare=[random,mmr]"]):
        texts = [f"run_dir={tmp_path}", "score.compare=[mmr,random]", *options]
        context = open_run(str(tiny / "tiny.yaml"), texts, write=False)
        found.add(context.step(context.stages[0], "score").fingerprint)
    assert len(found) == 3


def test_a_score_that_is_compared_and_ranks_nothing_stops_nothing(
    build: Callable[[list[str]], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [
        "score.blocks=[1,2]",
        "schedule=[1]",
        "score.first=last",
        "score.given=[0]",
        "score.compare=[given,first]",
    ]
    assert main(build(["score", "{tiny}/tiny.yaml", f"run_dir={tmp_path / 'run'}", *blocks])) == 0
    record = json.loads((tmp_path / "run" / "stages" / "01-H1-1" / "score" / "scores.json").read_text())
    assert [each["scorer"] for each in record["compared"]] == ["first"]
    assert "warning: given has the same score for all blocks" in capsys.readouterr().out
