"""Engines: what contradicts the run is refused, with what to set; what the run says is filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill import engine
from distill.config import EngineConfig, TrainConfig
from distill.errors import UserError

TRAIN = TrainConfig(batch_size=16, gradient_accumulation=2, max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("keys", "world", "said"),
    [
        ({"name": "deepsped"}, 2, "unknown engine.name 'deepsped' (did you mean 'deepspeed'?)"),
        ({"name": "ddp", "config": "zero3"}, 2, "engine.config=zero3 with engine.name=ddp"),
        ({"name": "none"}, 2, "engine.name=none trains in one process, and 2 were started"),
        ({"name": "fsdp", "config": "zero3"}, 2, "unknown engine.config 'zero3'"),
        ({"timeout": 0.5}, 2, "engine.timeout=0.5 must be at least 1"),
        ({}, 3, "train.batch_size=16 rows cannot be shared by 3 processes in train.gradient_accumulation=2"),
        ({}, 5, "must be a multiple of 10, such as 10 or 20"),
        ({}, 16, "must be a multiple of 32, such as 32"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], world: int, said: str) -> None:
    with pytest.raises(UserError) as caught:
        engine.check_engine(EngineConfig(**keys), TRAIN, "float32", world)
    assert said in str(caught.value)


def test_a_fine_tuning_that_cannot_be_shared_names_its_own_keys() -> None:
    with pytest.raises(UserError, match=r"sft.batch_size=16 rows cannot be shared by 3 processes in sft.gradient_acc"):
        engine.check_engine(EngineConfig(), TRAIN, "float32", 3, "sft")


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package deepspeed.*pip install 'distill-hybrid"):
        engine.check_engine(EngineConfig(name="deepspeed"), TRAIN, "float32", 2)


@pytest.mark.parametrize(
    ("settings", "dtype", "said"),
    [
        ({"train_batch_size": 8}, "float32", "has train_batch_size=8, and the run 16 (train.batch_size)"),
        ({"gradient_accumulation_steps": 1}, "float32", "gradient_accumulation_steps=1, and the run 2"),
        ({"gradient_clipping": 1.0}, "float32", "gradient_clipping=1.0, and the run 0.5"),
        ({"optimizer": {"type": "AdamW"}}, "float32", "has 'optimizer', which is the run's own"),
        ({"bf16": {"enabled": True}}, "float32", "computes in bfloat16 (bf16), and the run in dtype=float32"),
        ({}, "bfloat16", "computes in float32, and the run in dtype=bfloat16"),
        ({"fp16": {"enabled": True}}, "float32", "has 'fp16'"),
    ],
)
def test_a_config_that_contradicts_the_run_is_refused(
    tmp_path: Path, settings: dict[str, Any], dtype: str, said: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    with pytest.raises(UserError) as caught:
        engine.deepspeed_settings(EngineConfig(name="deepspeed", config=str(path)), TRAIN, dtype, 2)
    assert said in str(caught.value)


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a DeepSpeed config"):
        engine.read_deepspeed(EngineConfig(name="deepspeed", config=str(tmp_path / "torn.json")))
    with pytest.raises(UserError, match=r"zero4 is no DeepSpeed config \(did you mean 'zero"):
        engine.read_deepspeed(EngineConfig(name="deepspeed", config="zero4"))


@pytest.mark.parametrize("name", engine.presets())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_configs_take_what_the_run_says(name: str, dtype: str) -> None:
    settings = engine.deepspeed_settings(EngineConfig(name="deepspeed", config=name), TRAIN, dtype, 4)
    assert settings["train_batch_size"] == 16 and settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2 and settings["gradient_clipping"] == 0.5
    assert settings["torch_autocast"]["enabled"] == (dtype == "bfloat16")
    assert engine.zero_stage(EngineConfig(name="deepspeed", config=name)) == int(name[4])
    assert any(engine.offloaded(EngineConfig(name="deepspeed", config=name))) == name.endswith("offload")
