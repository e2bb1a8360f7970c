"""``mixer.init: aligned`` through the command line: the same bits whoever has aligned, and a killed score goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.importance import prefixes
from stages.cli import main

Capture = pytest.CaptureFixture[str]
OVERRIDES = ("mixer.init=aligned", "score.aligned={steps: 3, heldout_tokens: 256}", "schedule=[2]")


def swap(tiny: Path, run: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The weights that a stage starts from, after score, place and swap."""
    assert main(["score", str(tiny / "tiny.yaml"), f"run_dir={run}", *OVERRIDES, *overrides]) == 0
    for verb in ("place", "swap"):
        assert main([verb, str(run)]) == 0
    return load_file(run / "stages" / "01-H1-2" / "swap" / "checkpoint" / "model.safetensors")


def record(run: Path, step: str, name: str) -> Any:
    return json.loads((run / "stages" / "01-H1-2" / step / name).read_text())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_stage_starts_from_the_aligned_mixers(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    first = swap(tiny, tmp_path / "a", "score.first=aligned")
    added = record(tmp_path / "a", "place", "placement.json")["added"]
    assert added == sorted(record(tmp_path / "a", "score", "scores.json")["order"][:2])
    kept = sorted((tmp_path / "a").glob("stages/01-H1-2/score/aligned/*/*"))
    assert [path.name for path in kept] == [f"block-00{block}.safetensors" for block in range(3)]
    for block in added:
        for name, tensor in load_file(kept[block]).items():
            assert torch.equal(first[f"model.layers.{block}.self_attn.{name}"], tensor)
    capsys.readouterr()
    other = swap(tiny, tmp_path / "b", "score.first=given", f"score.given=[{', '.join(map(str, added))}]")
    assert "alignment of 2 mixers" in capsys.readouterr().out, "no score has aligned any: the swap does"
    assert same(first, other)
    plain = swap(tiny, tmp_path / "c", "score.first=aligned", "mixer.init=mil")
    assert not same(first, plain)
    assert record(tmp_path / "c", "score", "scores.json") == record(tmp_path / "a", "score", "scores.json")


def test_a_score_that_was_cut_short_keeps_its_mixers(
    tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["score", str(tiny / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", *OVERRIDES, "score.first=greedy"]

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prefixes, "record", killed)
        assert main(command) != 0
    capsys.readouterr()
    assert main(command) == 0
    assert "3 of 3 mixers are aligned already" in capsys.readouterr().out
    scores = record(tmp_path / "run", "score", "scores.json")
    assert main([*command[:2], f"run_dir={tmp_path / 'whole'}", *command[3:]]) == 0
    assert scores == record(tmp_path / "whole", "score", "scores.json")
    assert len(scores["rounds"]) == 2 and scores["order"][:2] == [each["chosen"] for each in scores["rounds"]]
    assert main(["score", str(tmp_path / "run"), "--stage", "1", "--candidate", "0"]) == 2
    assert "greedy scores its candidates together: leave out --candidate" in capsys.readouterr().err
