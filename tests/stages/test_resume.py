"""A run that is moved, shared, damaged, starved or stopped, through the command line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import stages.train
from distill import lock
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from stages.cli import main

CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [1, 2]
run_dir: {folder}/run
threads: 1
data: {{sequence_length: 64, mix: {{mod: 1.0, add: 1.0}}}}
score:
  loo: {{questions: 4}}
  mmr: {{steps: 1, heldout_tokens: 64}}
train: {{steps: 6, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 2, save_steps: 2, keep_steps: [3]}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 1
  max_new_tokens: 4
  throughput: {{batches: [1], contexts: [], repeats: 1, output_tokens: 8}}
"""
STAGE = "stages/01-H1-1"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the run that it makes, finished."""
    folder = tmp_path_factory.mktemp("done")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 4,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    assert main(["run", str(folder / "tiny.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def half(done: Path, tmp_path: Path) -> Path:
    """The run as far as the training of the first stage, which is not begun, at another place."""
    run = shutil.copytree(done, tmp_path / "half")
    shutil.rmtree(run / "stages/02-H1-2")
    for step in ("train", "measure"):
        shutil.rmtree(run / STAGE / step)
    return run


def weights(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


def test_a_finished_run_moved_elsewhere_is_skipped(done: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(done, tmp_path / "new" / "place")
    assert main(["run", str(run)]) == 0
    said = capsys.readouterr()
    assert said.out.count("is done already") == 10 and str(done) not in said.out
    assert not (run / "run.lock").exists()


def test_a_training_stopped_and_moved_continues(
    done: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """SIGTERM in step 4: a checkpoint of it, exit code 143; from another place to the same bits."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    fit = stages.train.fit
    with monkeypatch.context() as patch:
        patch.setattr(stages.train, "fit", lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, Signal()], **k))
        assert main(["run", str(half)]) == 143
    assert capsys.readouterr().err.endswith("distill run: stopped by SIGTERM; the same command continues\n")
    assert (half / STAGE / "train.partial/checkpoints/checkpoint-4").is_dir()
    assert not (half / "run.lock").exists()
    run = half.rename(tmp_path / "moved")
    assert main(["run", str(run)]) == 0
    assert f"H1-1/3: continuing from {run / STAGE}/train.partial/checkpoints/checkpoint-4" in capsys.readouterr().out
    assert weights(run) == weights(done)


def test_a_run_of_an_earlier_version_is_taken_as_it_is(done: Path, tmp_path: Path, capsys: Any) -> None:
    """Neither a version nor checksums, and inputs without the keys that came later: done, whatever their defaults."""
    run = shutil.copytree(done, tmp_path / "run")
    later = {"split", "subset", "revision", "columns", "too_long", "streaming", "shuffle_buffer", "bc_norm"}
    for file in run.rglob("step.json"):
        record = json.loads(file.read_text())
        del record["files"]
        assert not later & {key for part in record["inputs"].values() if isinstance(part, dict) for key in part}
        file.write_text(json.dumps(record))
    lines = (run / "run.yaml").read_text().splitlines(keepends=True)
    dropped = ("version:", *(f"  {key}:" for key in later))
    (run / "run.yaml").write_text("".join(line for line in lines if not line.startswith(dropped)))
    assert main(["run", str(run)]) == 0
    assert capsys.readouterr().out.count("is done already") == 10
    assert main(["run", str(run), "data.too_long=drop"]) == 2
    assert "too_long: (absent) -> drop" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "train", "measure", "sft"])
def test_the_second_process_on_a_run_is_told_of_the_first(verb: str, done: Path, tmp_path: Path, capsys: Any) -> None:
    half = shutil.copytree(done, tmp_path / "half")
    shutil.rmtree(half / "stages/02-H1-2")
    shutil.rmtree(half / STAGE / "measure")
    holder = {**lock.myself(), "host": "node7", "pid": 7, "since": "2026-11-21 09:00:00", "command": "distill run demo"}
    (half / "run.lock").write_text(json.dumps(holder))
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    assert main([verb, str(half)]) == 2
    error = capsys.readouterr().err
    assert f"{half} is in use: host node7, pid 7, since 2026-11-21 09:00:00\n  by: distill run demo" in error
    assert error.count("\n") <= 5
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before
    assert main(["report", str(half)]) == 0, "reading is free"
    assert main(["plan", str(half), "plan.device_tflops=1"]) == 0


def test_a_damaged_file_stops_the_step_that_reads_it(done: Path, half: Path, capsys: Any) -> None:
    """And the command that the message names mends it."""
    file = half / STAGE / "swap/checkpoint/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 16
    file.write_bytes(content)
    assert main(["report", str(half)]) == 0, "a report does not read it"
    assert main(["run", str(half)]) == 2
    error = capsys.readouterr().err
    assert f"{file} is damaged: its checksum is another; step 01-H1-1/swap wrote it" in error
    assert f"do that step again (distill swap {half} --stage 1 --force), then this command" in error
    assert not (half / STAGE / "train.partial").exists()
    assert main(["swap", str(half), "--stage", "1", "--force"]) == 0
    assert main(["train", str(half)]) == 0
    name = f"{STAGE}/train/checkpoint/model.safetensors"
    assert weights(half)[name] == weights(done)[name]


def test_a_full_disk_is_one_message_and_more_room_continues(done: Path, half: Path, capsys: Any) -> None:
    """No file may be as large as a checkpoint's optimizer state: the training can write none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (half / STAGE / "swap/checkpoint/model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, before[1]))
    try:
        assert main(["train", str(half)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert error.startswith(f"distill train: cannot write to {half / STAGE}/train.partial/checkpoints: ")
    assert "MiB free: too little" in error and "the same command continues" in error and error.count("\n") <= 5
    assert list((half / STAGE / "train.partial/checkpoints").iterdir()) == []
    assert main(["train", str(half)]) == 0
    name = f"{STAGE}/train/checkpoint/model.safetensors"
    assert weights(half)[name] == weights(done)[name]
