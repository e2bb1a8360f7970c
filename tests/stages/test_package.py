"""``distill package``: a folder for a model hub from a run or a checkpoint, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import distill
from distill.config import DataConfig, RunConfig, SourceConfig
from distill.records import verify
from distill.schedule import build_schedule
from stages.cli import main
from stages.lineage import lineage

Build = Callable[[list[str]], list[str]]
Capture = pytest.CaptureFixture[str]
PACKAGE = ["package", "{tmp}/run", "--output", "{tmp}/out"]


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run whose first stage was fine-tuned, too."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny / "run", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.report.plots_of", lambda *_: [])
        assert main(["sft", str(folder), "--stage", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("options", "name", "checkpoint"),
    [
        ([], "H1-2/3", "stages/02-H1-2/train/checkpoint"),
        (["--stage", "H1-1"], "H1-1/3", "stages/01-H1-1/train/checkpoint"),
        (["--stage", "1"], "H1-1/3", "stages/01-H1-1/train/checkpoint"),
        (["--stage", "H1-1/3-SFT"], "H1-1/3-SFT", "posttrain/01-H1-1-SFT/merge/checkpoint"),
        (["--stage", "H1-1-SFT"], "H1-1/3-SFT", "posttrain/01-H1-1-SFT/merge/checkpoint"),
    ],
)
def test_a_stage_of_a_run(
    options: list[str], name: str, checkpoint: str, tuned: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "my-hybrid"
    assert main(["package", str(tuned), *options, "--output", str(target)]) == 0
    assert f"{name} -> {target}" in capsys.readouterr().out
    weights, packaged = (load_file(folder / "model.safetensors") for folder in (tuned / checkpoint, target))
    assert all(torch.equal(weights[key], packaged[key]) for key in weights) and len(weights) == len(packaged)
    text = (target / "README.md").read_text()
    assert text.count(f"{name}: an attention-Mamba hybrid of `teacher`") == 1
    assert [result.dataset_name for result in ModelCard(text).data.eval_results] == ["add"]
    assert "times the teacher's" in text and "Cache in MiB" in text and "tokens along the lineage" in text
    assert "| H1-1/3 | 2 | 1,024 | embedded | reverse_kl |" in text and "→" in text
    for path in target.iterdir():
        content = path.read_bytes()
        assert str(tuned.parent).encode() not in content and str(tiny).encode() not in content, path.name
    verify(tuned / checkpoint)  # what was sealed is as it was
    model, _ = distill.load(target)
    assert sum(mixer != "attention" for mixer in model.config.mixers) == int(name[3])


def test_a_checkpoint_says_what_its_run_knows(tuned: Path, tmp_path: Path) -> None:
    """By whatever name it is given, and also one that was never measured."""
    for number, given in enumerate(["stages/01-H1-1", "stages/01-H1-1/train/checkpoint"]):
        assert main(["package", str(tuned / given), "--output", str(tmp_path / f"out{number}")]) == 0
        assert "times the teacher's" in (tmp_path / f"out{number}/README.md").read_text()
    assert main(["package", str(tuned / "stages/01-H1-1/swap"), "--output", str(tmp_path / "swapped")]) == 0
    assert "Nothing yet" in (tmp_path / "swapped/README.md").read_text()


def test_a_checkpoint_without_its_run(tuned: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(tuned / "posttrain/01-H1-1-SFT/merge/checkpoint", tmp_path / "alone")
    assert main(["package", str(tmp_path / "alone"), "--output", str(tmp_path / "out"), "--code"]) == 0
    assert "nothing was measured of it yet" in capsys.readouterr().out
    text = (tmp_path / "out/README.md").read_text()
    assert "H1-1/3-SFT: an attention-Mamba hybrid (llama)" in text and "merged with H1-1/3" in text
    assert (tmp_path / "out/modeling_hybrid.py").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["package", "{tmp}/run"], "--output"),
        (["package", "{tmp}/missing", "--output", "{tmp}/out"], "no folder"),
        (["package", "{tmp}/an_empty_folder", "--output", "{tmp}/out"], "is no checkpoint"),
        (["package", "{tmp}/a_file", "--output", "{tmp}/out"], "no folder"),
        (["package", "{tmp}/run", "--output", "{tmp}/an_empty_folder"], "exists already"),
        (["package", "{tmp}/run", "--output", "{tmp}/a_file"], "exists already"),
        (["package", "{tmp}/run", "--output", "{tmp}/a_file/below"], "cannot write"),
        ([*PACKAGE, "--stage", "H1-9"], "no distilled stage 'H1-9'"),
        ([*PACKAGE, "--stage", "7"], "it has H1-1/3, H1-2/3"),
        ([*PACKAGE, "--codee"], "did you mean '--code'"),
        ([*PACKAGE, "code=true"], "unknown argument 'code=true'"),
        (["package", "{tiny}/run/stages/01-H1-1", "--stage", "1", "--output", "{tmp}/out"], "needs a RUN"),
        (["package", "{tiny}/teacher", "--output", "{tmp}/out"], "is no hybrid but a llama"),
        (["package", "{tmp}/no_train", "--stage", "1", "--output", "{tmp}/out"], "no distilled stage '1'"),
        (["package", "{tmp}/no_trains", "--output", "{tmp}/out"], "no folder"),
        (["package", "{tmp}/flipped_sealed", "--stage", "1", "--output", "{tmp}/out"], "is damaged"),
        (["package", "{tmp}/torn_weights", "--stage", "1", "--output", "{tmp}/out"], "model.safetensors"),
        (["package", "{tmp}/torn_measure", "--output", "{tmp}/out"], "measure.json cannot be read"),
        (["package", "{tmp}/torn_yaml", "--output", "{tmp}/out"], "run.yaml"),
        (["package", "{tmp}/code", "--output", "{tmp}/out"], "brings Python code of its own"),
    ],
)
def test_bad_input(command: list[str], message: str, build: Build, capsys: Capture, tmp_path: Path) -> None:
    given = build(command)
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(given)
    except SystemExit as exit:
        code = int(str(exit.code))
    text = capsys.readouterr().err
    assert code == 2 and message in text, text
    assert "Traceback" not in text and text.count("\n") <= 5
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_says_what_it_does(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["package", "--help"])
    text = capsys.readouterr().out
    assert "CHECKPOINT|RUN" in text and "--code" in text and "--stage" in text


def test_a_lineage_names_every_source_of_a_mixture() -> None:
    data = DataConfig(mixture=[SourceConfig(source="a.jsonl"), SourceConfig(source="owner/b")])
    config = RunConfig(schedule=[1], data=data)
    stages = build_schedule(config, 3)
    assert lineage(config, stages, stages[0])[0]["data"] == "a.jsonl + owner/b"
