"""A teacher trained from nothing: run again it is not trained again, and its scores can be measured anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from distill.config import PretrainConfig, SourceConfig
from distill.config_merge import load_config
from eval import accuracy
from stages import pretrain
from stages.cli import main

CONFIG = """
name: tiny
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
  intermediate_size: 32}
threads: 1
data: {sequence_length: 128}
train: {loss: cross_entropy, steps: 3, batch_size: 2, save_steps: 2}
"""
MIXED = """
output: {folder}/out
threads: 1
model: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 1}}
data:
  mixture: [{{source: embedded}}, {{source: "{folder}/mine.jsonl", weight: 3}}]
  sequence_length: 64
train: {{loss: cross_entropy, steps: 2, batch_size: 4}}
"""
SHIPPED = Path(pretrain.__file__).parents[1] / "distill" / "data" / "teacher"
SCORES = accuracy.Scores(
    [{"task": "add", "kind": "generative", "metric": "exact_match", "value": 0.5, "stderr": 0.1, "n": 2}],
    [{"task": "add", "distance": d, "value": 0.5, "stderr": 0.1, "n": 1} for d in (1, 2)],
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return ["pretrain", str(tmp_path / "tiny.yaml"), f"output={tmp_path / 'teacher'}"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were measured, in place of doing it."""
    models: list[Any] = []

    def evaluate(model: Any, *_: Any, **__: Any) -> accuracy.Scores:
        models.append(model)
        return SCORES

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    return models


@pytest.fixture
def trained(command: list[str], measured: list[Any], tmp_path: Path) -> Path:
    """The folder of a finished training."""
    assert main(command) == 0
    return tmp_path / "teacher"


def state(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be trained")


def test_a_finished_folder_is_left_as_it_is(
    trained: Path, command: list[str], measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files = {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "log.jsonl", "scores.json"}
    assert files <= set(state(trained)) and not list(trained.glob("*partial*"))
    before = state(trained)
    monkeypatch.setattr(pretrain, "fit", refuse)
    capsys.readouterr()
    assert main(command) == 0
    assert state(trained) == before and len(measured) == 1
    out = capsys.readouterr().out
    assert "nothing is trained" in out and "50.0% +- 10.0   by columns 1-2: 50" in out


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_a_teacher_of_any_family_that_can_be_converted(
    family: str, command: list[str], measured: list[Any], tmp_path: Path
) -> None:
    shape = (
        "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32"
    )
    assert main([*command, f"model={{model_type: {family}, {shape}}}", "train.steps=1"]) == 0
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["model_type"] == family and config["vocab_size"] == 64 and config["eos_token_id"] == 4
    assert main(["plan", "demo", f"teacher={tmp_path / 'teacher'}", "schedule=[1]", "plan.device_tflops=1"]) == 0


def test_only_removed_scores_are_measured_again(
    trained: Path, command: list[str], measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the weights that the folder holds."""
    (trained / "scores.json").unlink()
    before = state(trained)
    monkeypatch.setattr(pretrain, "fit", refuse)
    assert main(command) == 0
    assert json.loads((trained / "scores.json").read_text()) == SCORES.record
    assert {name: at for name, at in state(trained).items() if name != "scores.json"} == before
    saved = load_file(trained / "model.safetensors")["model.norm.weight"]
    assert measured[-1].model.norm.weight.equal(saved.float())


def test_keys_with_their_defaults_are_no_difference(trained: Path, command: list[str], capsys: Any) -> None:
    """A recipe written before a key existed, at another place."""
    recipe = trained / "recipe.yaml"
    keys = yaml.safe_load(recipe.read_text())
    del keys["train"]["mixer_learning_rate"], keys["train"]["temperature"]
    recipe.write_text(yaml.safe_dump({**keys, "output": "elsewhere"}))
    text = recipe.read_text()
    assert main(command) == 0
    assert recipe.read_text() == text
    for change, line in (("train.steps=4", "train.steps: 3 -> 4"), ("train.temperature=2", "temperature: 1.0 -> 2.0")):
        capsys.readouterr()
        assert main([*command, change]) == 2
        assert line in capsys.readouterr().err


def test_a_training_cut_short_goes_on(
    command: list[str], measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Killed before the weights are whole, the same command continues from the newest checkpoint."""
    folder = tmp_path / "teacher"
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if target == folder / "model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert main(command) == 130
    assert not (folder / "model.safetensors").exists() and (folder / "checkpoints/checkpoint-2").is_dir()
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing is trained" not in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and not (folder / "model.partial").exists()


def test_a_model_of_unknown_recipe_is_not_overwritten(trained: Path, command: list[str], capsys: Any) -> None:
    (trained / "recipe.yaml").unlink()
    before = state(trained)
    assert main(command) == 2
    assert "a model without its recipe.yaml" in capsys.readouterr().err
    assert state(trained) == before


def test_scores_in_another_form_are_named(trained: Path, command: list[str], capsys: Any) -> None:
    (trained / "scores.json").write_text("[]")
    assert main(command) == 2
    assert "scores.json is in another form: remove it" in capsys.readouterr().err


def test_the_shipped_scores_hold_every_distance() -> None:
    """Their questions by distance add up to those of the family, right and in all."""
    scores = json.loads((SHIPPED / "scores.json").read_text())
    families = [row for row in scores["accuracy"] if row["kind"] == "generative"]
    assert {row["task"] for row in families} == {"add", "mod", "chase", "recall", "sort"}
    for row in families:
        parts = [part for part in scores["by_distance"] if part["task"] == row["task"]]
        assert sum(part["n"] for part in parts) == row["n"]
        assert sum(part["n"] * part["value"] for part in parts) == pytest.approx(row["n"] * row["value"])


def test_the_shipped_teacher_is_of_the_shipped_recipe(
    tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """``distill pretrain teacher_polish output=distill/data/teacher`` shows its scores and writes nothing."""
    before = state(SHIPPED)
    monkeypatch.setattr(pretrain, "fit", refuse)
    assert main(["pretrain", "teacher_polish", f"output={SHIPPED}"]) == 0
    assert "recall             exact_match" in capsys.readouterr().out
    assert state(SHIPPED) == before and not measured
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 8e6


def test_pretrain_on_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "evaluate", lambda *_, **__: SCORES)
    path = tmp_path / "my.yaml"
    path.write_text(MIXED.format(folder=tmp_path))
    assert main(["pretrain", str(path)]) == 2
    assert "data.mixture[1].source: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is begun before the mistake is found"

    mine = [{"prompt": f"add {i}+1", "completion": str(i + 1)} for i in range(99)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    assert main(["pretrain", str(path)]) == 0
    recipe = tmp_path / "out/recipe.yaml"
    assert load_config(PretrainConfig, recipe).data.mixture[1] == SourceConfig(str(tmp_path / "mine.jsonl"), 3.0)
    assert len((tmp_path / "out/log.jsonl").read_text().splitlines()) == 2

    assert main(["pretrain", str(path), "data.mixture=[{source:embedded}]"]) == 2
    assert "is another recipe" in capsys.readouterr().err
