"""``distill bench`` from the command line: checkpoints, runs, shapes without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.throughput import one_in_n_out
from stages import bench
from stages.cli import main

Capture = pytest.CaptureFixture[str]
QUICK = [
    "--batches", "1,2", "--contexts", "8", "--output-tokens", "16", "--repeats", "1", "--threads", "1",
    "--lengths", "32,64", "--prefill-tokens", "16",
]  # fmt: skip


def test_a_run_and_a_checkpoint(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    """The teacher first, then the stages; a stage that is named a second time is measured once."""
    stage = tiny / "run" / "stages" / "01-H1-1"
    output = tmp_path / "deep" / "bench.json"
    assert main(["bench", str(tiny / "run"), str(stage), *QUICK, "--output", str(output)]) == 0
    text, record = capsys.readouterr().out, json.loads(output.read_text())
    names = ["teacher", "H1-1/3", "H1-2/3"]
    assert [row["model"] for row in record["throughput"]] == names * 6
    for row in record["serving"]["one_in_n_out"]:
        assert row["model"] in names and row["output_tokens"] == 16
        if row["protocol"] == "equal_batch":
            speed = one_in_n_out(record["throughput"], row["model"], row["batch"], 16)
            assert row["tokens_per_second"] == pytest.approx(speed)
    assert {row["protocol"] for row in record["serving"]["one_in_n_out"]} == {"equal_batch", "equal_memory"}
    assert {row["measured"] for row in record["serving"]["memory"]} == {True}
    assert record["backend"] == "hf" and record["dtype"] == "float32" and record["threads"] == 1
    for part in ("loading H1-2/3", "batch 2, context 16: teacher", "decode step", "1 in, 16 out", "equal memory",
                 "prefill", "memory of one sequence", "faster with mamba1", str(output)):  # fmt: skip
        assert part in text, part


def test_the_record_is_the_last_line(tiny: Path, capsys: Capture) -> None:
    assert main(["bench", str(tiny / "teacher"), *QUICK, "--full"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["how"] for row in record["serving"]["one_in_n_out"]] == ["full", "full", "sampled"]


def test_a_shape_for_a_named_device(capsys: Capture) -> None:
    asked = ["--shape", "apriel_h1_15b", "--h", "30", "--mixers", "mamba1", "--device", "H100", "--batches", "64"]
    assert main(["bench", *asked]) == 0
    text = capsys.readouterr().out
    record = json.loads(text.splitlines()[-1])
    assert record["backend"] == "roofline" and record["dtype"] == "bfloat16"
    assert record["serving"]["machine"]["name"] == "H100 SXM" and "nothing is measured" in text
    assert {row["model"] for row in record["throughput"]} == {"teacher", "H1-30/50 mamba1"}
    assert all(row["how"] == "predicted" for row in record["serving"]["one_in_n_out"])
    assert "quartiles" not in text and "800.0)*" in text, "memory is marked as computed"


def test_a_small_shape_is_measured(tiny: Path, capsys: Capture) -> None:
    assert main(["bench", "--shape", str(tiny / "tiny.yaml"), "--h", "0,2", "--mixers", "mamba2", *QUICK]) == 0
    text = capsys.readouterr().out
    record = json.loads(text.splitlines()[-1])
    assert record["backend"] == "hf" and "random weights" in text and "of rooflines" in text
    assert {row["model"] for row in record["throughput"]} == {"teacher", "H1-2/3 mamba2"}


def test_a_small_shape_for_a_device_is_predicted(tiny: Path, capsys: Capture) -> None:
    asked = ["--shape", str(tiny / "tiny.yaml"), "--h", "1", "--device", "l4", "--dtype", "float32", *QUICK]
    assert main(["bench", *asked]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["backend"] == "roofline" and record["dtype"] == "float32"
    weights = {row["model"]: row["weight_bytes"] for row in record["throughput"]}
    assert weights["H1-1/3 mamba1"] > weights["teacher"]


def test_two_models_of_one_name_are_told_apart(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    found: dict[str, Any] = bench.sources_of([str(tiny / "teacher"), str(tmp_path / "teacher")])
    assert list(found) == ["teacher", "teacher (2)"]


def test_a_stage_is_called_by_its_folder(tiny: Path) -> None:
    stage = tiny / "run" / "stages" / "01-H1-1"
    assert list(bench.sources_of([str(stage / "train" / "checkpoint")])) == ["01-H1-1"]
    assert bench.sources_of([str(stage)]) == bench.sources_of([str(stage / "train" / "checkpoint")])


def test_a_model_that_alone_fits_has_no_ratio(capsys: Capture) -> None:
    """131,072 tokens within an L40S: no room for the teacher's cache."""
    asked = ["--shape", "apriel_h1_15b", "--h", "40", "--mixers", "mamba1", "--device", "l40s", "--contexts", "64"]
    assert main(["bench", *asked, "--batches", "1", "--output-tokens", "131072"]) == 0
    text = capsys.readouterr().out
    wide = [r for r in json.loads(text.splitlines()[-1])["serving"]["one_in_n_out"] if r["protocol"] == "equal_memory"]
    assert [(row["model"], row["ratio"]) for row in wide] == [("H1-40/50 mamba1", None)]
