"""What ``distill plan`` says of a device's memory, beside what a rank of two holds at most (``pytest -s`` prints)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.plan import memory_lines
from tests.distributed import memory_worker
from tests.distributed.conftest import ROOT, environment

ZERO = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'distill-hybrid[deepspeed]'"),
]


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        pytest.param("ddp", "", marks=pytest.mark.slow),
        pytest.param("fsdp", "full", marks=pytest.mark.slow),
        pytest.param("fsdp", "grad_op", marks=pytest.mark.slow),
        *(pytest.param("deepspeed", config, marks=ZERO) for config in ("zero1", "zero2", "zero3")),
    ],
)
def test_the_peak_of_one_of_two_is_within_a_fifth(tmp_path: Path, engine: str, config: str) -> None:
    launch = [sys.executable, "-m", "distill.launch", "--nproc-per-node", "2", memory_worker.__file__]
    launch += [str(tmp_path / "peak.json"), engine, config]
    done = subprocess.run(launch, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    measured = json.loads((tmp_path / "peak.json").read_text())
    run = memory_worker.run_of(engine, config)
    lines = memory_lines(run, memory_worker.shape(), memory_worker.mixers_of(run), 2)
    told = float(lines[0].split(": ")[1].split(" GB")[0]) * 1e9
    print(f"{engine} {config}: {told / 1e6:.1f} MB told, {measured / 1e6:.1f} MB measured; {lines[1].strip()}")
    assert told == pytest.approx(measured, rel=0.2), lines
