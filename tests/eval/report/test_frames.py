"""What a run's records say, as frames."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from eval.frames import importance_frame, loss_frame, placement_frame, stage_frame, task_frame
from eval.provenance import commands, cost_frame, provenance_frame
from eval.runs import read_run
from eval.speeds import machine, memory_frame, pays_from, prefill_frame, protocol_frame, throughput_frame


def test_stage_frame_takes_means_over_a_kind(full: Path) -> None:
    teacher = stage_frame(read_run(full)).iloc[0]
    assert teacher["generative"] == pytest.approx((0.985 + 0.975 + 0.965) / 3)
    assert teacher["generative_stderr"] == pytest.approx(math.sqrt(3 * 0.03 / 100) / 3)
    assert teacher["multiple_choice"] == pytest.approx(0.955)


def test_a_mean_over_fewer_tasks_is_no_mean(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run")
    file = run / "stages" / "01-H1-5" / "measure" / "measure.json"
    runs.edit(file, accuracy=json.loads(file.read_text())["accuracy"][1:])
    frame = stage_frame(read_run(run))
    assert math.isnan(frame.loc[1, "add"]) and math.isnan(frame.loc[1, "generative"])
    assert frame.loc[1, "recall"] > 0 and frame.loc[2, "generative"] > 0


def test_teacher_speed_comes_from_the_stages_if_need_be(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run")
    runs.edit(run / "teacher" / "measure.json", headline=None)
    assert stage_frame(read_run(run)).loc[0, "tokens_per_second"] == 8123


def test_losses_lie_along_the_lineage(full: Path) -> None:
    frame = loss_frame(read_run(full))
    second = frame[frame["model"] == "H1-7/10"]
    assert (second["step"].iloc[0], second["tokens"].iloc[0]) == (0, 4096 * 200)
    assert second["tokens"].iloc[-1] == 2 * 4096 * 200
    assert frame["tokens"].is_monotonic_increasing
    assert second["eval_loss"].iloc[0] == pytest.approx(0.7)


def test_a_branch_starts_where_it_branched(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run")
    runs.edit(run / "stages" / "02-H1-7" / "measure" / "measure.json", tokens=4096 * 300)
    frame = loss_frame(read_run(run))
    assert frame[frame["model"] == "H1-7/10"]["tokens"].iloc[0] == 4096 * 100


def test_steps_logged_twice_count_once(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", {5: runs.stages[5]}, steps=20)
    log = run / "stages" / "01-H1-5" / "train" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 20, "loss": 9.0, "tokens": 81920}) + "\n")
    frame = loss_frame(read_run(run))
    assert list(frame["step"]) == list(range(21)) and frame["loss"].iloc[-1] == 9.0


def test_a_loss_that_diverged_leaves_a_gap(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", {5: runs.stages[5]}, steps=20)
    log = run / "stages" / "01-H1-5" / "train" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 21, "loss": math.inf, "tokens": 86016}) + "\n")
    frame = loss_frame(read_run(run))
    assert list(frame["step"])[-1] == 21 and math.isnan(frame["loss"].iloc[-1])


def test_throughput_has_one_teacher(full: Path) -> None:
    frame = throughput_frame(read_run(full))
    assert set(frame["model"]) == {"teacher", "H1-5/10", "H1-7/10"}
    assert not frame.duplicated(["model", "batch", "context"]).any()


def test_ratios_are_to_the_teacher_of_the_same_run(runs: Any, tmp_path: Path) -> None:
    """A machine that was twice as slow for one stage is so for its teacher, too."""
    run = runs.build(tmp_path / "run", steps=3)
    before = throughput_frame(read_run(run)).set_index(["model", "batch", "context"])["ratio"]
    file = run / "stages" / "02-H1-7" / "measure" / "measure.json"
    rows = json.loads(file.read_text())["throughput"]
    runs.edit(file, throughput=[{**row, "step_seconds": 2 * row["step_seconds"]} for row in rows])
    after = throughput_frame(read_run(run)).set_index(["model", "batch", "context"])["ratio"]
    pd.testing.assert_series_equal(before, after)
    assert after["teacher"].eq(1).all() and after["H1-7/10"].max() > 1.5


def test_importance_has_the_rank_and_what_became_of_the_block(runs: Any, full: Path, tmp_path: Path) -> None:
    frame = importance_frame(read_run(full))
    first = frame[frame["stage"] == 1].sort_values("rank")
    assert list(first["rank"]) == list(range(1, 11)) and first["score"].is_monotonic_increasing
    assert set(frame.loc[frame["replaced"], "block"]) == {1, 3, 4, 6, 8, 2, 7}
    assert set(frame.loc[frame["stage"] == 2, "block"]) == {0, 2, 5, 7, 9}
    run = shutil.copytree(full, tmp_path / "run")
    runs.edit(run / "stages/01-H1-5/score/scores.json", order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    told = importance_frame(read_run(run))
    assert list(told.loc[told["stage"] == 1].set_index("block")["rank"].sort_index()) == list(range(10, 0, -1))
    assert placement_frame(read_run(full)).groupby("name")["mixer"].value_counts()["H1-7/10", "mamba1"] == 7


def test_tasks_tell_samples_and_what_was_cut_off(served: Path, full: Path) -> None:
    row = task_frame(read_run(served)).query("model == 'H1-5/10' and task == 'add'").iloc[0]
    assert (row["samples"], row["truncated"], row["empty"], row["n"]) == (4, 3, 1, 100)
    assert task_frame(read_run(full))["truncated"].isna().all()


def test_both_protocols(served: Path, full: Path) -> None:
    frame = protocol_frame(read_run(served))
    assert list(frame["protocol"].unique()) == ["batch 1", "batch 32", "equal memory"]
    assert len(frame) == 3 * 4 and set(frame["roofline_fraction"]) == {0.71}
    row = frame[(frame["protocol"] == "equal memory") & (frame["model"] == "H1-7/10")].iloc[0]
    assert row["batch"] == 106 and row["memory_bytes"] == 2**30 and row["ratio"] == pytest.approx(1.71 * 106 / 32)
    old = protocol_frame(read_run(full))
    assert set(old["protocol"]) == {"batch 32"} and list(old["model"]) == ["teacher", "H1-5/10", "H1-7/10"]


def test_prefill_and_memory_by_length(served: Path, full: Path) -> None:
    run = read_run(served)
    assert prefill_frame(run).set_index(["model", "context"])["ratio"]["H1-7/10", 2048] == pytest.approx(1.71)
    memory = memory_frame(run).set_index(["model", "context"])
    assert memory.loc[("teacher", 131072), "bytes"] == 2**23 + 10 * 131072 * 512 + 2**18
    assert list(memory.loc["teacher", "computed"]) == [False, False, True, True]
    assert machine(run).startswith("a CPU: 21.0 GB/s copied, 150 Gflop/s")
    assert pays_from(run) == ["with mamba1 from context 1,200 at batch 1, not within a million tokens at batch 32"]
    assert prefill_frame(read_run(full)).empty and pays_from(read_run(full)) == []
    cache = memory_frame(read_run(full)).set_index(["model", "batch", "context"])
    assert cache.loc[("teacher", 32, 2048), "bytes"] == 32 * 10 * 2048 * 512 and not cache["computed"].any()


def test_cost_and_provenance(full: Path, runs: Any, tmp_path: Path) -> None:
    run = read_run(full)
    cost = cost_frame(run).set_index(["model", "step"])
    assert cost.loc[("H1-5/10", "train"), "tokens"] == 4096 * 200
    assert cost.loc[("H1-5/10", "train"), "seconds"] == pytest.approx(60 * 2.31), "of all sessions, not of the last"
    assert cost.loc[("H1-7/10", "measure"), "seconds"] == 35 and set(cost["device"]) == {"a CPU, 2 cores"}
    told = provenance_frame(run)
    assert len(told) == 11 and set(told["packages"]) == {"torch 2.13.0+cpu"}
    assert commands(run) == ["distill run demo"]
    old = runs.build(tmp_path / "old", steps=3)
    for file in old.rglob("step.json"):
        file.unlink()
    assert cost_frame(read_run(old)).empty
    assert commands(read_run(old)) == ["distill run old", "distill report old"]


def test_a_step_that_does_not_tell_its_provenance(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", stages={}, steps=3)
    runs.edit(run / "teacher/step.json", provenance={"packages": 3}, inputs=[], seconds="x")
    frame = provenance_frame(read_run(run))
    assert list(frame["packages"]) == [""] and math.isnan(cost_frame(read_run(run))["seconds"].iloc[0])
