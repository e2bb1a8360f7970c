"""A teacher's logits written once for a stage: resumed to the same bytes, refused when they do not fit, read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import stored_logits
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from stages.cli import main

CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [1]
run_dir: {folder}/run
threads: 1
data: {{sequence_length: 64, mix: {{mod: 1.0, add: 1.0}}}}
score: {{loo: {{questions: 4}}}}
train: {{steps: 4, batch_size: 2, learning_rate: 1.0e-3, eval_rows: 2, teacher_mode: offline, teacher_top_k: 8}}
"""
STAGE = "stages/01-H1-1"


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its swap."""
    folder = tmp_path_factory.mktemp("offline")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 4,
        "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    for verb in ("score", "place", "swap"):
        assert main([verb, str(folder / "tiny.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(swapped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swapped, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_it_is_written_once_and_says_what_it_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run)]) == 0  # writes it by itself
    said = capsys.readouterr().out
    gap = json.loads((run / STAGE / "cache" / "gap.json").read_text())
    assert gap["top_k"] == 8 and gap["bytes"] == sum(map(len, files(run / STAGE / "cache").values()))
    assert 0 < abs(gap["approximate"] - gap["exact"]) < 0.5 * gap["exact"]
    assert "reverse_kl is an approximation" in said and f"from the whole teacher {gap['exact']:.4f}" in said
    record = json.loads((run / STAGE / "train" / "train.json").read_text())
    assert record["eval_loss_start"] == pytest.approx(gap["approximate"], rel=1e-5)
    assert record["eval_loss_end"] < record["eval_loss_start"]
    assert main(["cache", str(run)]) == 0
    assert "cache is done" in capsys.readouterr().out


def test_stopped_it_goes_on_to_the_same_bytes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    assert main(["cache", str(whole), f"run_dir={whole}"]) == 0
    real, calls = stored_logits.write_json, []

    def stop(path: Path, content: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(stored_logits, "write_json", stop)
        assert main(["cache", str(run), f"run_dir={run}"]) == 130
    assert not (run / STAGE / "cache").exists() and len(files(run / STAGE / "cache.partial")) == 3
    assert main(["cache", str(run), f"run_dir={run}"]) == 0
    assert files(run / STAGE / "cache") == files(whole / STAGE / "cache") and len(files(run / STAGE / "cache")) == 5


def test_what_does_not_fit_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = f"run_dir={run}"
    assert main(["cache", str(run), at]) == 0
    for change, said in (
        ("train.teacher_top_k=9", "teacher_top_k: 8 -> 9"),
        ("seed=1", "seed: 0 -> 1"),
        ("data.sequence_length=32", "sequence_length: 64 -> 32"),
    ):
        assert main(["train", str(run), at, change]) == 2
        assert said in capsys.readouterr().err, change
    shard = sorted((run / STAGE / "cache").rglob("*.parquet"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    assert main(["train", str(run), at]) == 2
    said = capsys.readouterr().err
    assert "is damaged" in said and f"distill cache {run} --stage 1 --force" in said
