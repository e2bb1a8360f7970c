"""A run of a tiny teacher up to its first training, and ways to train it by one process or by several."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from stages.cli import main

ROOT = Path(__file__).parents[2]
STAGE = "stages/01-H1-2"
CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [2]
run_dir: {folder}/swapped
threads: 1
data: {{sequence_length: 64, mix: {{mod: 1.0, add: 1.0}}}}
score: {{loo: {{questions: 4}}}}
train: {{steps: 8, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4, weight_decay: 0.1}}
sft: {{steps: 4, batch_size: 4, gradient_accumulation: 2, learning_rate: 1.0e-3, warmup_steps: 1}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 1
  max_new_tokens: 4
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 16}}
"""


@pytest.fixture(scope="session")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which the training comes next."""
    folder = tmp_path_factory.mktemp("swapped")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 4,
        "initializer_range": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    rows = [{"prompt": f"add {i} {7 * i}", "completion": "1" * (1 + i % 9)} for i in range(400)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb in ("score", "place", "swap"):
        assert main([verb, str(folder / "tiny.yaml")]) == 0
    return folder / "swapped"


@pytest.fixture
def copy(swapped: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``copy(name)``: the run under another name."""
    return lambda name: shutil.copytree(swapped, tmp_path / name)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def command(processes: int, run: Path, *overrides: str, verb: str = "train") -> list[str]:
    """``distill train`` (or another verb) of a run by several processes."""
    launch = [sys.executable, "-m", "distill.launch", "--nproc-per-node", str(processes), "-m", "stages.cli"]
    return [*launch, verb, str(run), *overrides]


def train(processes: int, run: Path, *overrides: str, verb: str = "train", timeout: float = 300) -> tuple[int, str]:
    """Train a run by several processes; the exit code, and what was said."""
    done = subprocess.run(
        command(processes, run, *overrides, verb=verb), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def weights(run: Path, model: str = "train/checkpoint") -> dict[str, torch.Tensor]:
    return load_file(run / STAGE / model / "model.safetensors")


def apart(one: Path, other: Path, model: str = "train/checkpoint", start_from: str = "swap/checkpoint") -> float:
    """How far two trainings ended from each other, relative to how far they went."""
    start, first, second = weights(one, start_from), weights(one, model), weights(other, model)
    assert first.keys() == second.keys()
    went = torch.cat([(first[name] - start[name]).flatten() for name in first]).norm()
    between = torch.cat([(first[name] - second[name]).flatten() for name in first]).norm()
    return float(between / went)


def check_tuned(one: Path, other: Path, engine: str, processes: int) -> None:
    """That the other run was fine-tuned by so many processes, and as the first, which was by one."""
    tuned = f"../../posttrain/{STAGE.split('/')[1]}-SFT"
    assert apart(one, other, f"{tuned}/train/checkpoint", "train/checkpoint") < 1e-4
    first, second = (json.loads((run / STAGE / tuned / "train/train.json").read_text()) for run in (one, other))
    assert (second["engine"], second["processes"]) == (engine, processes)
    for key in ("eval_loss_start", "eval_loss_end"):
        assert second[key] == pytest.approx(first[key], rel=1e-4)
    for run in (one, other):
        assert (run / STAGE / tuned / "merge/checkpoint/model.safetensors").is_file()
        assert (run / STAGE / tuned / "measure/measure.json").is_file()
        assert not (run / STAGE / tuned / "train/start.json").exists()


def check_best(one: Path, other: Path) -> None:
    """That both trainings kept the same step as the best, and the same model."""
    first, second = (json.loads((run / STAGE / "train/best.json").read_text()) for run in (one, other))
    assert second["step"] == first["step"]
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-4)
    assert apart(one, other, "train/best") < 1e-4
