"""The whole chain through the command line, on tiny random teachers of every supported family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
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
teacher: {teacher}
schedule: [1, 3]
run_dir: {run}
threads: 1
data: {{sequence_length: 128}}
score:
  loo: {{questions: 10}}
  mmr: {{steps: 2, heldout_tokens: 256}}
train: {{steps: 3, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4, save_steps: 2}}
measure:
  generative: [embedded_add]
  multiple_choice: [embedded_choice]
  limit: 2
  throughput: {{batches: [1, 2], contexts: [16], repeats: 1, output_tokens: 32}}
"""


@pytest.fixture(params=["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A config for a run on a tiny random teacher."""
    torch.manual_seed(0)
    model: Any
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE))
    else:
        model = MistralForCausalLM(MistralConfig(sliding_window=None, **SHAPE))
    model.save_pretrained(tmp_path / "teacher")
    build_tokenizer().save_pretrained(tmp_path / "teacher")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(teacher=tmp_path / "teacher", run=tmp_path / "run"))
    return path


def test_run_writes_every_record_and_is_idempotent(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config)]) == 0
    run = config.parent / "run"
    first, last = run / "stages" / "01-H1-1", run / "stages" / "02-H1-3"
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert json.loads((first / "score/scores.json").read_text())["scorer"] == "loo"
    scores = json.loads((last / "score/scores.json").read_text())
    assert scores["scorer"] == "mmr"
    assert len(scores["blocks"]) == 3
    placement = json.loads((last / "place/placement.json").read_text())
    assert placement["mixers"].count("mamba1") == 3
    assert placement["added"] == sorted(scores["order"][:2])
    measure = json.loads((last / "measure/measure.json").read_text())
    assert measure["tokens"] == 2 * 3 * 4 * 128
    assert {row["model"] for row in measure["throughput"]} == {"teacher", "H1-3/4"}
    assert {row["kind"] for row in measure["accuracy"]} == {"generative", "multiple_choice"}
    assert sum(row["n"] for row in measure["by_distance"] if row["task"] == "add") == 2
    assert (run / "report" / "tables" / "by_distance.csv").is_file()
    hybrid = AutoModelForCausalLM.from_pretrained(last / "train/checkpoint")
    assert hybrid.config.mixers == placement["mixers"]
    assert not list(run.rglob("*.partial"))

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    capsys.readouterr()
    assert main(["run", str(run)]) == 0
    assert capsys.readouterr().out.count("is done already") == 10
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before

    # changed inputs are refused with the difference; nothing is touched
    assert main(["run", str(config), "train.steps=4"]) == 2
    assert "steps: 3 -> 4" in capsys.readouterr().err
    assert "steps: 3" in (run / "run.yaml").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before

    # with --force, the changed step and what follows are done again
    assert main(["run", str(config), "train.steps=4", "--force"]) == 0
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    swapped = first / "swap/checkpoint/model.safetensors"
    assert after[swapped] == before[swapped], "steps before the change stand"
    assert json.loads((last / "train/train.json").read_text())["steps"] == 4


def test_verbs_one_by_one_equal_the_run(config: Path, tmp_path: Path) -> None:
    """The same config by single verbs, out of order refused, ends with the same weights and scores."""
    assert main(["run", str(config)]) == 0
    other = ["run_dir=" + str(tmp_path / "other")]
    assert main(["train", str(config), *other]) == 2
    for stage in ("1", "H1-3"):
        for verb in ("score", "place", "swap", "train", "measure"):
            assert main([verb, str(config), *other, "--stage", stage]) == 0
    assert main(["report", str(tmp_path / "other")]) == 0
    for name in ("01-H1-1", "02-H1-3"):
        a, b = (tmp_path / run / "stages" / name for run in ("run", "other"))
        left, right = (load_file(x / "train/checkpoint/model.safetensors") for x in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert (a / "score/scores.json").read_text() == (b / "score/scores.json").read_text()


def test_blocks_may_get_different_mixers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = ["run", str(config), "mixer.blocks={0: mamba2, 1: mamba2}"]
    assert main(mixed) == 0
    last = config.parent / "run/stages/02-H1-3"
    placed = json.loads((last / "place/placement.json").read_text())["mixers"]
    assert len(placed) == 4 and {"mamba1", "mamba2", "attention"} == set(placed)
    assert all(mixer in ("mamba2", "attention") for mixer in placed[:2])
    assert all(mixer in ("mamba1", "attention") for mixer in placed[2:])
    assert json.loads((last / "train/checkpoint/config.json").read_text())["mixers"] == placed
    capsys.readouterr()
    assert main(mixed) == 0 and "is done already" in capsys.readouterr().out
    assert main(["run", str(config)]) == 2, "other mixers are other inputs"
    assert "mamba2" in (config.parent / "run/report/report.html").read_text()


def test_schedule_can_be_extended(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config), "schedule=[1]"]) == 0
    capsys.readouterr()
    assert main(["run", str(config), "schedule=[1,2]"]) == 0
    assert capsys.readouterr().out.count("is done already") == 5
    assert (config.parent / "run/stages/02-H1-2/measure/measure.json").is_file()


def test_bfloat16_runs_on_float32_masters(config: Path) -> None:
    assert main(["run", str(config), "dtype=bfloat16", "schedule=[1,2]"]) == 0
    trained = load_file(config.parent / "run/stages/02-H1-2/train/checkpoint/model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    carried = load_file(config.parent / "run/stages/02-H1-2/swap/checkpoint/model.safetensors")
    assert {tensor.dtype for tensor in carried.values()} == {torch.float32}, "trained weights are not rounded"
    swapped = load_file(config.parent / "run/stages/01-H1-1/swap/checkpoint/model.safetensors")
    wide = {name for name, tensor in swapped.items() if tensor.dtype == torch.float32}
    assert wide
    assert all(name.endswith((".A_log", ".D")) for name in wide)


def test_own_traces(config: Path) -> None:
    """A user's JSONL in place of the embedded data."""
    traces = config.parent / "traces.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"add {i}+1"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(200)
    ]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["run", str(config), f"data.source={traces}", "schedule=[1]"]) == 0


@pytest.mark.parametrize("config", ["llama"], indirect=True)
def test_a_mixture(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A distillation (of MMR) on two sources; a change in either file is noticed, the unused source is no input."""
    traces = config.parent / "traces.jsonl"
    traces.write_text(
        "".join(json.dumps({"prompt": f"add {i}+1", "completion": f" {i + 1}"}) + "\n" for i in range(99))
    )
    mixture = f"data.mixture=[{{source:{traces},weight:3}},{{source:embedded}}]"
    command = ["score", str(config), mixture, "schedule=[1]", "score.first=mmr", "score.mmr.steps=1"]
    assert main([*command, "data.source=none.jsonl"]) == 0
    assert main([*command, "data.source=other.jsonl"]) == 0
    assert "score is done in every stage" in capsys.readouterr().out
    assert main([*command, mixture.replace("weight:3", "weight:2")]) == 2
    assert "data.mixture" in capsys.readouterr().err
    traces.write_text(traces.read_text().replace("add", "sort"))
    assert main(command) == 2
    assert f"data.content.{traces}" in capsys.readouterr().err


def test_force_redoes_only_what_depends_on_the_change(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(config)]) == 0
    run = config.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert main(["measure", str(run), "--stage", "1"]) == 0
    assert main(["measure", str(run), "measure.limit=1", "--force", "--stage", "1"]) == 0
    assert main(["measure", str(run), "--stage", "2", "--force", "measure.limit=1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert main(["score", str(run), "--force"]) == 2
    assert "--force needs --stage" in capsys.readouterr().err


def test_changed_data_or_teacher_is_noticed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = config.parent / "traces.jsonl"
    traces.write_text(
        "".join(json.dumps({"prompt": f"add {i}+1", "completion": f" {i + 1}"}) + "\n" for i in range(99))
    )
    command = ["train", str(config), f"data.source={traces}", "schedule=[1]"]
    assert main(["run", *command[1:]]) == 0
    traces.write_text(traces.read_text().replace("add", "sort"))
    assert main(command) == 2
    assert "data.content" in capsys.readouterr().err
    template = config.parent / "teacher/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert main(command) == 2
    assert "teacher:" in capsys.readouterr().err


def test_weights_that_miss_a_block_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    path = config.parent / "teacher/model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.2." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    assert main(["run", str(config)]) == 2
    assert "are not those of its config" in capsys.readouterr().err
