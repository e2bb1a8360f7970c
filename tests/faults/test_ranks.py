"""kill -9 of one process of two, and of the whole job, at seeded random moments of a training by two processes on
streamed data, prepared by a worker each; then the same command again, to the bits of the training that was left alone.
A process that hangs is named, in bounded time.

Environment: FAULTS_RANK_KILLS (how many kills, by default 9), FAULTS_SEED.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.checkpoints import checkpoints_of, fault
from tests.distributed.conftest import ROOT, STAGE, command, environment, swapped, train, weights

__all__ = ["swapped"]  # the fixture
pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FAULTS_RANK_KILLS", "9"))
SEED = os.environ.get("FAULTS_SEED", "0")
OPTIONS = ("train.steps=60", "train.save_steps=3", "train.keep_steps=[31]", "train.batch_size=4")
VICTIMS = ("rank 0", "rank 1", "the job")


@pytest.fixture(scope="module")
def alone(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes end with when nothing happens to them."""
    import shutil

    run = shutil.copytree(swapped, tmp_path_factory.mktemp("alone") / "alone")
    code, said = train(2, run, *OPTIONS, *streamed(swapped))
    assert code == 0, said
    return run


def streamed(swapped: Path) -> tuple[str, ...]:
    """What makes the training read its rows from a stream."""
    source = f"data.source={swapped.with_name('data.jsonl')}"
    return (source, "data.streaming=true", "data.shuffle_buffer=16", "train.data_workers=1")


def start(run: Path, *options: str) -> subprocess.Popen[bytes]:
    with open(run.with_name(run.name + ".log"), "ab") as log:
        return subprocess.Popen(
            command(2, run, *OPTIONS, *options), cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def ranks(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a job, by rank."""
    found = [child for child in psutil.Process(job.pid).children() if "RANK" in child.environ()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def steps_of(run: Path) -> list[int]:
    return list(checkpoints_of(run / STAGE / "train.partial/checkpoints"))


def test_processes_killed_anywhere(alone: Path, swapped: Path, tmp_path: Path) -> None:
    import shutil

    rng, hits = random.Random(f"ranks {SEED}"), Counter[str]()
    run, number = shutil.copytree(swapped, tmp_path / "run0"), 0
    expected = (alone / STAGE / "train/checkpoint/model.safetensors").read_bytes()
    kept = (alone / STAGE / "train/steps/000031/model.safetensors").read_bytes()
    while sum(hits.values()) < KILLS:
        job = start(run, *streamed(swapped))
        before, ahead = max(steps_of(run), default=0), rng.randint(1, 4)
        while job.poll() is None and max(steps_of(run), default=0) < before + 3 * ahead:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        processes = ranks(job) if job.poll() is None else []
        if len(processes) < 2:  # it was quicker
            assert job.wait() == 0, run.with_name(run.name + ".log").read_text()[-3000:]
            assert (run / STAGE / "train/checkpoint/model.safetensors").read_bytes() == expected
            number += 1
            run = shutil.copytree(swapped, tmp_path / f"run{number}")
            continue
        victim = VICTIMS[sum(hits.values()) % 3]
        began = time.monotonic()
        if victim == "the job":
            for process in (psutil.Process(job.pid), *processes):
                process.kill()
            job.wait()
            psutil.wait_procs(processes, timeout=30)
        else:
            processes[int(victim[-1])].kill()
            assert job.wait(60) == 76, "a lost process ends the job, with the code that says so"
            assert f"{victim} by SIGKILL" in run.with_name(run.name + ".log").read_text()
        assert time.monotonic() - began < 60
        hits[victim] += 1
        whole = list(checkpoints_of(run / STAGE / "train.partial/checkpoints").values())
        assert all(fault(path) is None for path in whole), "a checkpoint with a name is whole"
    assert start(run, *streamed(swapped)).wait() == 0, run.with_name(run.name + ".log").read_text()[-3000:]
    print(f"\n{dict(hits)} killed over {number + 1} run folders, all ended with the bits of the one left alone")
    assert (run / STAGE / "train/checkpoint/model.safetensors").read_bytes() == expected
    assert (run / STAGE / "train/steps/000031/model.safetensors").read_bytes() == kept
    assert not weights(run)["model.norm.weight"].equal(weights(run, "swap/checkpoint")["model.norm.weight"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named(swapped: Path, tmp_path: Path, rank: int) -> None:
    import shutil

    run = shutil.copytree(swapped, tmp_path / "run")
    job = start(run, "engine.timeout=5", "train.steps=2000")
    while not steps_of(run):
        assert job.poll() is None
        time.sleep(0.01)
    processes: Any = ranks(job)
    processes[rank].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.wait(120) == 76
    assert time.monotonic() - began < 60
    said = run.with_name("run.log").read_text()
    assert f"rank {rank} (host" in said and "has shown no sign of life for 5 s" in said
