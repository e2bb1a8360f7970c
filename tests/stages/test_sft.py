"""Fine-tuning a stage through the command line, on a tiny run: done, skipped, refused, resumed, reported."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.posttrain import sft
from eval import report
from stages.cli import main

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 4,
}
CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [1, 3]
run_dir: {folder}/run
threads: 1
data: {{sequence_length: 128}}
score:
  loo: {{questions: 4}}
  mmr: {{steps: 1, heldout_tokens: 128}}
train: {{steps: 2, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4}}
sft: {{steps: 4, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, save_steps: 2, alpha: 0.25}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 1
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 16}}
"""
TOKENS = 2 * 4 * 128  # of one stage
OWN = 4 * 4 * 128  # of the fine-tuning


@pytest.fixture(scope="module", autouse=True)
def no_drawing() -> Iterator[None]:
    """The report without its figures, which take most of its time and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Plot, "images", None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two stages (and its config, teacher), not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    assert main(["run", str(folder / "tiny.yaml")]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_a_stage_is_tuned_merged_measured_and_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(run)
    assert main(["sft", str(run)]) == 0
    tuned, stage = run / "posttrain" / "02-H1-3-SFT", run / "stages" / "02-H1-3" / "train"
    train, measure = (json.loads((tuned / f"{step}/{step}.json").read_text()) for step in ("train", "measure"))
    assert train["tokens"] == OWN and train["loss"] == "cross_entropy"
    assert 0 < train["eval_loss_end"] < train["eval_loss_start"]
    assert measure["name"] == "H1-3/4-SFT" and measure["replaced"] == 3
    assert measure["tokens"] == 2 * TOKENS + OWN
    assert {row["model"] for row in measure["throughput"]} == {"teacher", "H1-3/4-SFT"}
    a, b, merged = weights(tuned / "train"), weights(stage), weights(tuned / "merge")
    for key, tensor in merged.items():
        assert torch.allclose(tensor, 0.25 * a[key] + 0.75 * b[key], atol=1e-6), key
    assert any(not torch.equal(a[key], b[key]) for key in a)
    model = AutoModelForCausalLM.from_pretrained(tuned / "merge" / "checkpoint")
    assert model.config.mixers == json.loads((stage.parent / "place/placement.json").read_text())["mixers"]
    assert not list(run.rglob("*.partial")) and not (tuned / "train" / "checkpoints").exists()

    assert "H1-3/4-SFT" in capsys.readouterr().out
    page = (run / "report" / "report.html").read_text()
    assert "H1-3/4-SFT" in page and "Fine-tuning" in page and "alpha = 0.25" in page
    rows = list(csv.DictReader((run / "report" / "tables" / "stages.csv").open()))
    assert [row["name"] for row in rows] == ["teacher", "H1-1/4", "H1-3/4", "H1-3/4-SFT"]
    assert rows[3]["stage"] == "2" and float(rows[3]["tokens"]) == measure["tokens"]

    # again: nothing is done; an earlier stage, with other values, is a fine-tuning of its own
    after = times(run)
    assert {path: after[path] for path in before} == before
    assert main(["sft", str(run)]) == 0
    assert capsys.readouterr().out.count("H1-3/4-SFT: ") == 3
    assert times(run) == after
    assert main(["sft", str(run), "--stage", "H1-1", "sft.steps=2"]) == 0
    out = capsys.readouterr().out
    assert times(run).items() > after.items()
    names = [line.split()[0] for line in out.splitlines() if line.startswith(("teacher ", "H1-")) and "±" in line]
    assert names[:5] == ["teacher", "H1-1/4", "H1-1/4-SFT", "H1-3/4", "H1-3/4-SFT"]
    assert main(["run", str(run)]) == 0, "what was fine-tuned with other values is not the run's business"


def test_changed_inputs_are_refused_and_forced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(run)]) == 0
    tuned, before = run / "posttrain" / "02-H1-3-SFT", times(run)
    capsys.readouterr()
    for change, shown in (("sft.steps=5", "steps: 4 -> 5"), ("sft.alpha=0.5", "alpha: 0.25 -> 0.5")):
        assert main(["sft", str(run), change]) == 2
        assert shown in capsys.readouterr().err
    assert times(run) == before and "alpha: 0.25" in (run / "run.yaml").read_text()
    assert main(["sft", str(run), "sft.alpha=1", "--force"]) == 0
    after = times(run)
    assert {path for path in before if before[path] != after[path]} == {tuned / "merge/checkpoint/model.safetensors"}
    assert same(tuned / "merge", tuned / "train"), "alpha = 1 is the fine-tuned model"

    # what the fine-tuning was made of is made again: it goes with it
    assert main(["train", str(run), "--stage", "2", "--force"]) == 0
    assert not list(tuned.glob("*/step.json"))


class Cut(BaseException):
    """What a kill would be."""


class CutAtStep3(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise Cut


def test_resumed_equals_uninterrupted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    assert main(["sft", str(whole)]) == 0
    seen: list[int] = []

    class Watched(sft.TraceTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    class Killed(sft.TraceTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(CutAtStep3())

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(sft, "TraceTrainer", Killed)
        main(["sft", str(run)])
    assert (run / "posttrain/02-H1-3-SFT/train.partial/checkpoints/checkpoint-2").is_dir()
    assert main(["report", str(run)]) == 0
    assert "train (reached step 3 of 4)" in (run / "report/report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(sft, "TraceTrainer", Watched)
        assert main(["sft", str(run)]) == 0
    assert seen == [2, 3], "it goes on from the checkpoint"
    for step in ("train", "merge"):
        folders = [each / "posttrain/02-H1-3-SFT" / step for each in (run, whole)]
        assert same(*folders)


def test_mistakes(run: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one message, before any work."""
    before = (run / "run.yaml").read_text()
    stage = str(run / "stages/01-H1-1")
    mistakes = [
        (["sft", str(run), "sft.alpha=1.5"], "sft.alpha=1.5 must be in [0, 1]"),
        (["sft", str(run), "sft.steps=0"], "sft.steps=0 must be above 0"),
        (["sft", str(run), "sft.batch_size=3", "sft.gradient_accumulation=2"], "sft.batch_size=3 is not divisible"),
        (["sft", str(run), "sft.source=/nowhere.jsonl"], "sft.source: no such file"),
        (["sft", str(run), "sft.stesp=3"], "did you mean 'steps'"),
        (["sft", str(run), "--stage", "H1-2"], "no stage 'H1-2'"),
        (["sft", str(finished / "tiny.yaml"), f"run_dir={tmp_path / 'new'}"], "has been distilled"),
        (["merge", stage, str(run / "stages/02-H1-3"), "--output", str(tmp_path / "x")], "placements differ in 2"),
        (["merge", stage, str(tmp_path), "--output", str(tmp_path / "x")], "is no checkpoint"),
        (["merge", stage, stage, "--alpha", "2", "--output", str(tmp_path / "x")], "must be in [0, 1]"),
        (["merge", stage, stage, "--output", str(run)], "exists already"),
    ]
    for command, message in mistakes:
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert (run / "run.yaml").read_text() == before
    assert not (tmp_path / "new").exists() and not (tmp_path / "x").exists() and not (run / "posttrain").exists()
    assert main(["merge", stage, stage, "--alpha", "0.5", "--output", str(tmp_path / "x")]) == 0
    assert torch.equal(
        load_file(tmp_path / "x/model.safetensors")["model.norm.weight"],
        weights(run / "stages/01-H1-1/train")["model.norm.weight"],
    )


def test_own_traces_for_fine_tuning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other traces than those of the distillation, and a change in them is noticed."""
    traces = run.parent / "traces.jsonl"
    lines = [json.dumps({"prompt": f"add {i}+1", "completion": f" {i + 1}"}) + "\n" for i in range(99)]
    traces.write_text("".join(lines))
    command = ["sft", str(run), f"sft.source={traces}", "--stage", "1"]
    assert main(command) == 0
    record = json.loads((run / "posttrain/01-H1-1-SFT/train/step.json").read_text())
    assert record["inputs"]["data"]["source"] == str(traces)
    traces.write_text("".join(lines).replace("add", "sort"))
    capsys.readouterr()
    assert main(command) == 2
    assert "data.content" in capsys.readouterr().err
