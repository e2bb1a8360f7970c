"""GGUF files where checkpoints are measured: the same answers, times of the same form, a place in the run's report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.config import ThroughputConfig
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.export import gguf
from distill.export.quantize import quantize
from distill.teacher import load_model
from eval import report, throughput
from eval.backends import backend
from eval.backends.llama_cpp import kind_of
from eval.backends.llama_runtime import File
from eval.runs import read_run
from eval.wellformed import problem
from stages.cli import main

pytestmark = pytest.mark.gguf
Capture = pytest.CaptureFixture[str]
RUN = """
name: native
teacher: {folder}/teacher
schedule: [1, 2]
run_dir: {folder}/run
threads: 1
mixer: {{name: mamba2}}
data: {{sequence_length: 128}}
score: {{loo: {{questions: 4}}, mmr: {{steps: 1, heldout_tokens: 128}}}}
train: {{steps: 2, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4}}
measure:
  generative: [embedded_add]
  multiple_choice: [embedded_choice]
  limit: 4
  throughput: {{batches: [1, 2], contexts: [16], repeats: 2, output_tokens: 16, prefill_tokens: 32, lengths: [32]}}
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a teacher that fits the container, ``run``, and its first stage's file."""
    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, pad_token_id=0, eos_token_id=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "native.yaml").write_text(RUN.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots_of", lambda *_: [])
        assert main(["run", str(folder / "native.yaml")]) == 0
    gguf.export(folder / "run/stages/01-H1-1/train/checkpoint", folder / "hybrid.gguf")
    return folder


def test_a_file_answers_as_its_checkpoint(native: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out.json"
    tasks = ["measure.generative=[embedded_add,embedded_mod]", "measure.multiple_choice=[embedded_choice]"]
    checkpoint, file = native / "run/stages/01-H1-1", native / "hybrid.gguf"
    command = ["measure", str(checkpoint), str(file), *tasks, "measure.limit=6", "--output", str(output)]
    assert main([*command, "threads=1"]) == 0
    ours, theirs = json.loads(output.read_text())
    assert problem("measure", theirs) == "" and theirs["name"] == "hybrid.gguf"
    assert ours["accuracy"] == theirs["accuracy"] and len(ours["accuracy"]) == 3
    for key in ("replaced", "num_blocks", "parameters"):
        assert ours[key] == theirs[key]
    assert "note: the tokenizer" not in capsys.readouterr().out


def test_sampled_answers_are_those_of_the_checkpoint_too(native: Path, tmp_path: Path) -> None:
    sampled = ["measure.temperature=0.7", "measure.samples=2", "measure.limit=3", "measure.batch_size=2", "threads=1"]
    tasks = ["measure.generative=[embedded_add]", "measure.multiple_choice=[]", "measure.max_new_tokens=12"]
    output = tmp_path / "out.json"
    models = [str(native / "run/stages/01-H1-1"), str(native / "hybrid.gguf")]
    assert main(["measure", *models, *tasks, *sampled, "--output", str(output)]) == 0
    ours, theirs = json.loads(output.read_text())
    assert ours["accuracy"] == theirs["accuracy"]


def test_times_stand_beside_those_of_the_checkpoint(native: Path) -> None:
    checkpoint = native / "run/stages/01-H1-1/train/checkpoint"
    engine = backend("llama.cpp").open_model(str(native / "hybrid.gguf"), "file", "float32")
    models = {"teacher": load_model(str(native / "teacher")), "folder": load_model(str(checkpoint)), "file": engine}
    options = ThroughputConfig(batches=[1, 3], contexts=[8, 300], repeats=2, output_tokens=40)
    rows = pd.DataFrame(throughput.measure(models, options)).set_index(["model", "batch", "context"])
    assert (rows["step_seconds"] > 0).all()
    file, folder = rows.loc["file"], rows.loc["folder"]
    assert (file["kv_bytes"] == folder["kv_bytes"]).all()  # both in float32
    assert (file["state_bytes"] > folder["state_bytes"]).all()  # twice the heads
    assert 1 < (file["weight_bytes"] / folder["weight_bytes"]).iloc[0] < 2
    engine.prepare(2, 50)
    assert engine.generate(20) > 0 and engine.prefill(2, 30) > 0 and engine.step(1) > 0 and engine.step(50) > 0
    assert engine.step(10) > 0  # back to a smaller context
    with pytest.raises(ValueError, match="holds 50 tokens of a sequence, 51 were given"):
        engine.step(60)


def test_narrow_keys_and_values(native: Path) -> None:
    engine = backend("llama.cpp").open_model(str(native / "hybrid.gguf"), "file", "bfloat16")
    whole = backend("llama.cpp").open_model(str(native / "hybrid.gguf"), "file", "float32")
    for each in (engine, whole):
        each.prepare(1, 64)
        each.step(64)
    assert 2 * engine.cache_bytes(64)["kv_bytes"] == whole.cache_bytes(64)["kv_bytes"]


def test_bench_takes_files_and_folders(native: Path, tmp_path: Path, capsys: Capture) -> None:
    file, folder, output = native / "hybrid.gguf", native / "run/stages/01-H1-1", tmp_path / "bench.json"
    shapes = ["--batches", "1", "--contexts", "8", "--output-tokens", "16", "--repeats", "1", "--lengths", "32"]
    few = [*shapes, "--prefill-tokens", "16", "--threads", "1"]
    assert main(["bench", str(native / "teacher"), str(folder), str(file), *few, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert {row["model"] for row in record["throughput"]} == {"teacher", "01-H1-1", "hybrid.gguf"}
    capsys.readouterr()
    assert main(["bench", str(folder), "--backend", "llama.cpp", *few]) == 2
    assert "takes a GGUF file" in capsys.readouterr().err


def test_a_file_stands_in_the_report_of_its_run(native: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    shutil.copytree(native / "run", run)
    measure = ["measure", str(run), f"run_dir={run}", "--gguf", str(native / "hybrid.gguf")]
    assert main(measure) == 2 and "needs --stage" in capsys.readouterr().err
    assert main([*measure, "--stage", "H1-2"]) == 2
    assert "has 1 of 3 blocks replaced" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots_of", lambda *_: [])
        assert main([*measure, "--stage", "H1-1"]) == 0
    text = capsys.readouterr().out
    assert any(line.startswith("H1-1/3-F32") for line in text.splitlines()), text
    found = next(model for model in read_run(run).models if model.name == "H1-1/3-F32")
    record, stage = found.records["measure"], read_run(run).stages[0].records["measure"]
    assert record is not None and stage is not None and record["headline"]["ratio"] > 0
    assert record["accuracy"] == stage["accuracy"] and record["tokens"] == stage["tokens"]
    page = (run / "report/report.html").read_text()
    assert "H1-1/3-F32" in page
    assert main([*measure, "--stage", "H1-1"]) == 0 and "is done already" in capsys.readouterr().out


def test_a_file_of_which_a_component_is_quantised_has_a_name_of_its_own(native: Path, tmp_path: Path) -> None:
    """It would stand in the report as the type of the whole, and keep a file of that out of it."""
    names = []
    for only in (None, "mamba"):
        path = quantize(native / "hybrid.gguf", tmp_path / f"{only}.gguf", "Q8_0", only=only, threads=1).path
        names.append(kind_of(File(path, words_only=True)))
    assert names == ["Q8_0", "Q8_0-mamba"] and kind_of(File(native / "hybrid.gguf")) == "F32"


def test_what_is_no_file_of_ours_is_refused(
    native: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.gguf").write_bytes((native / "hybrid.gguf").read_bytes()[:5000])
    (tmp_path / "zip.gguf").write_bytes(b"PK" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "ORIGIN", "another.key")
        gguf.export(native / "run/stages/01-H1-1/train/checkpoint", tmp_path / "theirs.gguf")
    for name, message in (
        ("missing", "no file"),
        ("zip", "is no GGUF file"),
        ("cut", "llama.cpp cannot read"),
        ("theirs", "does not say which hybrid it is"),
    ):
        for verb in ("measure", "bench"):
            assert main([verb, str(tmp_path / f"{name}.gguf")]) == 2, name
            assert message in capsys.readouterr().err
    file, output = str(native / "hybrid.gguf"), ["--output", str(tmp_path / "o")]
    for arguments in (["export", file, "--to", "hf-native", *output], ["package", file, *output], ["run", file]):
        assert main(arguments) == 2
        assert file in capsys.readouterr().err
