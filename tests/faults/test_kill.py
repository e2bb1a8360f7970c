"""kill -9 of the whole process group at seeded random moments, then the same command again, to the same bits.

Environment: FAULTS_KILLS (how many, by default 60), FAULTS_SEED, FAULTS_JOBS (chains side by side, by default 2).
A chain is one run folder that is killed again and again as it comes along, and then runs to its end.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distill.storage import checksums

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FAULTS_KILLS", "60"))
SEED = os.environ.get("FAULTS_SEED", "0")
JOBS = int(os.environ.get("FAULTS_JOBS", "2"))
STAGES = ("01-H1-1", "02-H1-2")
IN_A_STAGE = ("score", "place", "swap", *["checkpoint"] * 3, "train", *["checkpoint"] * 3, "measure")
PLAN = [("teacher", "measure"), *((stage, what) for stage in STAGES for what in IN_A_STAGE), ("", "report")]
POLL = 0.0005


def step_folder(run: Path, stage: str, what: str) -> Path:
    if stage == "teacher":
        return run / "teacher"
    return run / "stages" / stage / ("train" if what == "checkpoint" else what)


@dataclass
class Chain:
    """One run folder and what befell it."""

    lab: Any
    number: int
    kills: int
    rng: random.Random = field(init=False)
    hits: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{SEED} {self.number}")
        self.run = self.lab.folder / f"chain-{self.number}"

    def play(self) -> None:
        """Kill at each of the planned places, in their order, then run to the end and compare."""
        chosen = sorted(self.rng.sample(range(len(PLAN)), min(self.kills, len(PLAN))))
        for place in chosen:
            self.attempt(*PLAN[place])
        if self.process is not None:
            self.lab.kill(self.process)
            self.note()
        code, output = self.lab.finish(self.run)
        if code:
            self.problems.append(f"the last start ended with {code}: {output[-600:]}")
        else:
            self.problems += [f"{name} differs" for name in self.lab.differences(self.run)]

    def attempt(self, stage: str, what: str) -> None:
        """Wait for one place, then a random part of the time that it takes, and kill. A place that is past is left."""
        if self.process is None:
            self.started = time.time()
            self.process = self.lab.start(self.run)
        if what == "checkpoint":
            there, past = self.appearance(stage), step_folder(self.run, stage, what)
            delay = self.rng.uniform(0, 0.9 * self.lab.seconds["checkpoint"])
        elif what == "report":
            last = step_folder(self.run, STAGES[-1], "measure")
            there, past = last.is_dir, self.run / "no such file"
            delay = self.rng.uniform(0, 0.9 * self.lab.seconds["report"])
        else:
            folder = step_folder(self.run, stage, what)
            there, past = folder.with_name(folder.name + ".partial").is_dir, folder
            whole = self.lab.seconds["teacher" if stage == "teacher" else f"{stage}/{what}"]
            delay = self.rng.uniform(0, (0.5 if what == "train" else 0.9) * whole)
        while not there():
            if self.process.poll() is not None:
                if self.process.returncode:
                    self.problems.append(f"before {stage} {what}: ended with {self.process.returncode}")
                self.process = None
                return
            if past.is_dir():
                return
            time.sleep(POLL)
        until = time.monotonic() + delay
        while time.monotonic() < until:
            time.sleep(min(POLL, max(until - time.monotonic(), 0)))
        self.lab.kill(self.process)
        self.note()

    def appearance(self, stage: str) -> Callable[[], bool]:
        """A condition that comes true with the next checkpoint that begins to be written, or the one after that."""
        wanted, seen = self.rng.randint(1, 2), set(self.lab.building(self.run, stage, self.started))
        first = len(seen)

        def there() -> bool:
            seen.update(self.lab.building(self.run, stage, self.started))
            return len(seen) >= first + wanted

        return there

    def note(self) -> None:
        """Write down what the kill hit, from what it left."""
        assert self.process is not None
        if self.process.returncode != -9:  # it was quicker
            self.process = None
            return
        self.process = None
        partial = [path.name for path in self.run.rglob("*.partial") if path.is_dir()]
        if any(self.lab.building(self.run, stage, self.started) for stage in STAGES):
            self.hits.append("checkpoint write")
        elif partial:
            self.hits.append(partial[0].removesuffix(".partial").replace("teacher", "measure"))
        elif step_folder(self.run, STAGES[-1], "measure").is_dir():
            self.hits.append("report")
        else:
            self.hits.append("between steps")


def hashing_speed(folder: Path) -> float:
    """GB/s of ``checksums`` over four files of 256 MB that the system still holds in memory."""
    folder.mkdir()
    for number in range(4):
        (folder / str(number)).write_bytes(bytes([number]) * 256_000_000)
    began = time.monotonic()
    checksums(folder)
    return 1.024 / (time.monotonic() - began)


def test_killed_anywhere(lab: Any) -> None:
    per_chain = [len(PLAN)] * (KILLS // len(PLAN)) + ([KILLS % len(PLAN)] if KILLS % len(PLAN) else [])
    chains = [Chain(lab, number, kills) for number, kills in enumerate(per_chain)]
    began = time.monotonic()
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(Chain.play, chains))
    hits = Counter(hit for chain in chains for hit in chain.hits)
    killed, survived = sum(hits.values()), sum(len(chain.hits) for chain in chains if not chain.problems)
    print(f"\n{'kill hit':18s}kills")
    for where, count in hits.most_common():
        print(f"{where:18s}{count:5d}")
    print(f"{len(chains)} run folders, {(time.monotonic() - began) / 60:.1f} min, seed {SEED}")
    print(f"a checkpoint of the small run takes {1000 * lab.seconds['checkpoint']:.0f} ms to write")
    print(f"checksums: {hashing_speed(lab.folder / 'hashed'):.2f} GB/s on {os.cpu_count()} cores")
    lab.tally.update(killed=killed, survived=survived)
    assert [problem for chain in chains for problem in chain.problems] == []
    if len(PLAN) <= KILLS:
        assert hits.keys() >= {"score", "place", "swap", "train", "measure", "report"}
        assert killed >= 0.9 * KILLS
        assert 3 * hits["checkpoint write"] >= killed
