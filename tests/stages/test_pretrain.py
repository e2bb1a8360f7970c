"""Training a teacher from nothing: a mixture of data, and a recipe that is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stages.pretrain
from distill.config import PretrainConfig, SourceConfig, load_config
from stages.cli import main

CONFIG = """
output: {folder}/out
threads: 1
model: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 1}}
data:
  mixture: [{{source: embedded}}, {{source: "{folder}/mine.jsonl", weight: 3}}]
  sequence_length: 64
train: {{loss: cross_entropy, steps: 2, batch_size: 4}}
"""


def test_pretrain_on_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages.pretrain.accuracy, "evaluate", lambda *_, **__: [])
    path = tmp_path / "my.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
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
    kept = [line for line in recipe.read_text().splitlines() if "weight_decay" not in line]
    recipe.write_text("\n".join(kept) + "\n")
    assert main(["pretrain", str(path)]) == 0, "a recipe older than a key, which has its default, is the same"
