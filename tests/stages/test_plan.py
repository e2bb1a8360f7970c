"""Plan: pure text from a config, offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM

from distill.config import RunConfig
from distill.config_merge import load_config
from distill.data.tokenizer import build_tokenizer
from distill.hybrid.model import FAMILIES
from stages.cli import main
from stages.plan import sizes, teacher_config
from stages.targets import config_path


def test_plan_of_the_paper_works_offline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/apriel_h1_15b.yaml"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith("H1-")]
    assert [row[0] for row in rows] == [f"H1-{h}/50" for h in (25, 27, 30, 34, 37, 40)]
    assert [row[1] for row in rows] == ["loo"] + ["mmr"] * 5
    assert [int(row[2]) for row in rows] == [50, 25, 23, 20, 16, 13], "blocks that still have attention"
    assert "sequence 16,384, batch 64 rows, AdamW at 5e-05" in text
    for word in ("memory", "time", "disk", "14,974.2 M parameters"):
        assert word in text


def test_every_score_that_is_taken_costs_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, within a combination, or beside the one that decides."""
    hours = []
    for score in ("first=loo", "first=mmr", "{first: combine, combine: [loo, mmr]}", "compare=[mmr]"):
        text = f"score={score}" if score.startswith("{") else f"score.{score}"
        assert main(["plan", "demo", "schedule=[5]", "plan.device_tflops=1", text]) == 0
        lines = capsys.readouterr().out.splitlines()
        hours.append(float(next(line for line in lines if line.startswith("H1-5")).split()[-2]))
    assert hours[0] < hours[1] == hours[2] == hours[3]


def test_sizes_are_those_of_the_paper_and_of_real_modules() -> None:
    config = load_config(RunConfig, config_path("apriel_h1_15b"))
    teacher = teacher_config(config)
    size = sizes(config, teacher)
    assert size.attention == 5120 * (4096 + 1024 + 1024 + 4096)
    projections = 5120 * (4096 + 1024 + 1024 + 4096 + 320) + 4096 * 5120
    small = 4096 * 4 + 4096 + 320 * 4096 + 4096 + 4096 * 16 + 4096
    assert size.mixer == projections + small
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(teacher)
    assert size.total == plain.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_knows_every_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a config alone, with the head size left to the family; parameters are those of the real modules."""
    keys = "hidden_size: 64, num_hidden_layers: 8, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 99"
    written = f"teacher_config={{model_type: {family}, {keys}, pad_token_id: null, sliding_window: null}}"
    overrides = [written, "schedule=[4,6]", "plan.device_tflops=1"]
    assert main(["plan", "demo", *overrides]) == 0
    text = capsys.readouterr().out
    assert "8 blocks, hidden 64, 4 query / 2 key-value heads of" in text and "H1-6/8" in text
    config = load_config(RunConfig, config_path("demo"), overrides)
    teacher = teacher_config(config)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(teacher)
    assert sizes(config, teacher).total == plain.num_parameters()


def test_plan_writes_nothing(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", f"run_dir={tmp_path}/run"]) == 0
    assert "measured now" in capsys.readouterr().out
    import pathlib

    assert not (pathlib.Path(str(tmp_path)) / "run").exists()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["demo_mamba2"], "serving   exact in gguf, hf-native"),
        (["demo"], "serving   not in gguf, hf-native: mamba1"),
    ],
)
def test_plan_says_where_the_hybrids_can_be_served(
    command: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *command]) == 0
    assert line in capsys.readouterr().out


def test_plan_names_a_tokenizer_that_no_gguf_holds(
    make_llama: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama(hidden_size=128).save_pretrained(tmp_path / "teacher")
    tokenizer = build_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert main(["plan", "demo_mamba2", f"teacher={tmp_path / 'teacher'}", "schedule=[1]"]) == 0
    text = capsys.readouterr().out
    assert "exact in hf-native" in text and "has a tokenizer of the kind WordLevel, which no GGUF holds" in text
