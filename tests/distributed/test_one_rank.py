"""What one rank of two meets alone, both decide upon alike; and streamed rows are shared without overlap, whoever
prepares them and however often the training is cut short."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.checkpoints import checkpoints_of
from distill.config import DataConfig, MixerConfig
from distill.data.mixture import load_data
from distill.hybrid.surgery import hybridize
from tests.distributed import ranks_worker
from tests.distributed.conftest import ROOT, environment
from tests.distributed.ranks_worker import BAD, BATCH, LENGTH, STEPS, WORKERS

pytestmark = pytest.mark.slow  # ten trainings of two processes, a minute
RANKS = (0, 1)


@pytest.fixture(scope="module")
def two(make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trainings by two real processes."""
    folder = tmp_path_factory.mktemp("two")
    llama = make_llama()
    llama.save_pretrained(folder / "teacher")
    hybridize(llama, ["mamba1", "attention", "attention", "mamba2"], MixerConfig(), seed=0).save_pretrained(
        folder / "student"
    )
    rows = [{"prompt": f"add {i} {7 * i}", "completion": "1" * (1 + i % 9)} for i in range(160)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = [sys.executable, "-m", "distill.launch", "--nproc-per-node", "2", ranks_worker.__file__, str(folder)]
    done = subprocess.run(launch, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def ended(two: Path, name: str, rank: int) -> dict[str, Any]:
    """What a training of one rank ended with."""
    found: dict[str, Any] = torch.load(two / f"{name}-{rank}.pt")
    return found


def noted(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "guards.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["nan_skip", "spike_skip", "nan_roll_back"])
def test_both_ranks_leave_out_what_one_met(two: Path, tmp_path: Path, name: str) -> None:
    """The batch is noted once; weights are the same on both ranks, and those of one process that met it alone."""
    (event,) = noted(two / name)
    step, policy = BAD[name]["at"], BAD[name]["on_bad_loss"]
    assert (event["step"], event["policy"]) == (step, policy)
    assert event["rows"] == [(step - 1) * BATCH, step * BATCH - 1], "those of the global batch"
    assert event["what"] == ("loss jumped" if name == "spike_skip" else "loss not finite")
    first, second = (ended(two, name, rank) for rank in RANKS)
    for part in ("teacher", "student"):
        (tmp_path / part).symlink_to(two / part)
    data = DataConfig(sequence_length=LENGTH, mix={"mod": 1.0, "add": 1.0})
    alone = ranks_worker.train(tmp_path, name, data, **BAD[name])
    assert [event["step"] for event in noted(tmp_path / name)] == [step]
    for key, weight in first["weights"].items():
        assert weight.equal(second["weights"][key]), key
        torch.testing.assert_close(weight, alone["weights"][key], rtol=1e-4, atol=1e-5)
    came_by = [number for number, _ in second["seen"]].count(step)
    assert came_by == 2 * (2 if policy == "roll_back" else 1), "two micro-batches, once or once again"


@pytest.mark.parametrize("name", ["spike_stop", "nan_stop"])
def test_both_ranks_stop_where_one_has_to(two: Path, name: str) -> None:
    first, second = (ended(two, name, rank) for rank in RANKS)
    step = BAD[name]["at"]
    assert f"at step {step}: lower train.learning_rate" in first["said"] == second["said"]
    assert f"rows {(step - 1) * BATCH} to {step * BATCH - 1}, from 0" in first["said"]
    assert max(number for number, _ in second["seen"]) == step
    assert ("checkpoint-10" in first["said"]) == (name == "spike_stop")


def test_two_ranks_fine_tune_as_one(two: Path, tmp_path: Path) -> None:
    """Through TRL, whose loss counts the targets of the global batch, too."""
    (tmp_path / "student").symlink_to(two / "student")
    data = DataConfig(sequence_length=LENGTH, mix={"mod": 1.0, "add": 1.0})
    alone = ranks_worker.fine_tune(tmp_path, "tuned", data)["weights"]
    first, second = (ended(two, "tuned", rank)["weights"] for rank in RANKS)
    start = load_file(two / "student/model.safetensors")
    went = torch.cat([(alone[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(alone[name] - first[name]).flatten() for name in start]).norm()
    assert apart < 1e-4 * went
    assert all(weight.equal(second[name]) for name, weight in first.items())


def batches(two: Path, name: str) -> dict[int, torch.Tensor]:
    """Step -> the rows [BATCH, LENGTH] that the ranks saw in it, in the order of the data."""
    shares = [ended(two, name, rank)["seen"] for rank in RANKS]
    found: dict[int, list[torch.Tensor]] = {}
    for mine, others in zip(*shares, strict=True):  # micro-batches go round the ranks
        assert mine[0] == others[0]
        found.setdefault(mine[0], []).extend((mine[1], others[1]))
    return {step: torch.cat(parts) for step, parts in found.items()}


@pytest.fixture(scope="module")
def expected(two: Path, tokenizer: Any) -> list[torch.Tensor]:
    """The rows of every step, as one process has them."""
    data = DataConfig(source=str(two / "data.jsonl"), sequence_length=LENGTH, streaming=True, shuffle_buffer=8)
    rows: Any = load_data(data, tokenizer, STEPS * BATCH, 0)
    every = [rows[i]["input_ids"] for i in range(STEPS * BATCH)]
    assert len({tuple(row.tolist()) for row in every}) > STEPS * BATCH // 2, "rows that differ, so that order shows"
    return [torch.stack(every[start : start + BATCH]) for start in range(0, len(every), BATCH)]


@pytest.mark.parametrize("workers", WORKERS)
def test_streamed_rows_are_shared_without_overlap(two: Path, expected: list[torch.Tensor], workers: int) -> None:
    """Each once, in order, whatever the number of workers that prepare them."""
    found = batches(two, f"workers_{workers}")
    assert list(found) == list(range(1, STEPS + 1))
    for step, rows in found.items():
        assert rows.equal(expected[step - 1]), f"step {step}"
    for key, weight in ended(two, f"workers_{workers}", 0)["weights"].items():
        assert weight.equal(ended(two, "workers_0", 1)["weights"][key]), key
    kept = [STEPS, 12, 8, 4][: workers + 1]
    assert list(checkpoints_of(two / f"workers_{workers}/checkpoints")) == kept, "the newest, as many as asked for"


def test_a_stream_goes_on_where_a_checkpoint_was(two: Path, expected: list[torch.Tensor]) -> None:
    """Killed in step 7, the next start takes the rows of step 5 on, and ends with the bits of the one left alone."""
    assert list(batches(two, "killed")) == list(range(1, 8))
    found = batches(two, "resumed")
    assert list(found) == list(range(5, STEPS + 1))
    for step, rows in found.items():
        assert rows.equal(expected[step - 1]), f"step {step}"
    for key, weight in ended(two, "resumed", 1)["weights"].items():
        assert weight.equal(ended(two, "workers_1", 0)["weights"][key]), key
