"""A training on streamed data, cut short and resumed, ends with the bits of one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import DataConfig, SourceConfig, TrainConfig
from distill.data.mixture import load_data
from distill.trainer import LanguageTrainer, fit, training_arguments

STEPS, BATCH = 6, 4


def train(model: Any, tokenizer: Any, data: DataConfig, output: Path) -> dict[str, torch.Tensor]:
    """Train, going on from what is in ``output``, on rows of a dataset that is new, as in a new process."""
    rows = load_data(data, tokenizer, STEPS * BATCH, 0)
    options = TrainConfig(batch_size=BATCH, learning_rate=1e-3, warmup_steps=0, save_steps=2)
    fit(LanguageTrainer, model.train(), rows, training_arguments(options, STEPS, output, 0), title="t", log=None)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mixed", [False, True])
def test_resumed_equals_uninterrupted(
    make_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path, mixed: bool
) -> None:
    """The rows after step 4 are had from a stream that begins anew: those of the steps before are passed over."""
    path = tmp_path / "t.jsonl"
    lines = [{"prompt": f"add {i}", "completion": "1" * (i % 9)} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = [SourceConfig(str(path)), SourceConfig("embedded")] if mixed else []
    data = DataConfig(source=str(path), mixture=mixture, sequence_length=32, streaming=True, shuffle_buffer=8)
    whole = train(make_llama(), tokenizer, data, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    resumed = train(make_llama(), tokenizer, data, tmp_path / "cut")
    fresh = train(make_llama(), tokenizer, data, tmp_path / "fresh")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, fresh[name]), name
    assert any(not torch.equal(value, whole[name]) for name, value in make_llama().state_dict().items())
