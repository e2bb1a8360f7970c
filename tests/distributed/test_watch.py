"""The watch over a job's processes: who is silent or comes no further is named, who is only slow is not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch.distributed as dist

from distill.distributed import Job


class Judged(Exception):
    """In place of the end of the process."""


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The first of three processes, without the other two, and without the thread that watches by itself."""

    def judge(self: Job, text: str) -> None:
        raise Judged(text)

    monkeypatch.setattr(Job, "_judge", judge)
    job: Any = Job.__new__(Job)
    job.rank, job.world, job.bound, job.store, job._stuck = 0, 3, 0.2, dist.HashStore(), (None, 0.0)
    for rank in range(3):
        job.store.set(f"who/{rank}", json.dumps({"host": f"node{rank}", "pid": 100 + rank}))
    return job


def beat(job: Any, now: float, *states: tuple[int, bool, str]) -> None:
    """Every process shows a sign of life: how far it is, whether it trains, and where it is."""
    for rank, (marks, training, place) in enumerate(states):
        job.store.set(f"beat/{rank}", f"{now} {marks} {int(training)} {place}")


def test_a_silent_process_is_named(job: Any) -> None:
    seen: dict[int, tuple[str, float]] = {}
    states = [(5, True, "step 2, forward")] * 3
    beat(job, 0, *states)
    job._watch(seen)
    time.sleep(0.25)
    beat(job, 1, *states[:2])  # the third is gone
    with pytest.raises(Judged, match=r"rank 2 \(host node2, pid 102\) has shown no sign of life for 0.2 s"):
        job._watch(seen)


def test_who_hangs_while_others_wait_is_named(job: Any) -> None:
    seen: dict[int, tuple[str, float]] = {}
    states = [(8, True, "step 3, backward"), (7, True, "step 3, forward"), (8, True, "step 3, backward")]
    beat(job, 0, *states)
    job._watch(seen)
    time.sleep(0.25)
    beat(job, 1, *states)
    with pytest.raises(Judged, match=r"^rank 1 \(host node1, pid 101\) \(at step 3, forward\) came no further"):
        job._watch(seen)


def test_all_at_one_place_are_told_of(job: Any) -> None:
    seen: dict[int, tuple[str, float]] = {}
    for now in (0, 1):
        beat(job, now, *[(7, True, "step 3, forward")] * 3)
        if now:
            with pytest.raises(Judged, match="no process has come any further.*all of them at step 3, forward"):
                job._watch(seen)
        else:
            job._watch(seen)
            time.sleep(0.25)


@pytest.mark.parametrize("training", [True, False])
def test_who_comes_on_or_writes_a_checkpoint_is_left_alone(job: Any, training: bool) -> None:
    seen: dict[int, tuple[str, float]] = {}
    for now in range(4):
        marks = now if training else 7
        beat(job, now, *[(marks, training, "outside of the training")] * 3)
        job._watch(seen)
        time.sleep(0.15)
