"""A checkpoint that is torn or bit-flipped, a signal, a folder moved: the run ends with the same bits."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoints import checkpoints_of, fault

pytestmark = pytest.mark.slow
STAGE = "stages/02-H1-2"


@pytest.fixture(scope="module")
def stopped(lab: Any) -> Path:
    """A run that SIGTERM stopped in the second stage, with two checkpoints."""
    run: Path = lab.folder / "stopped"
    checkpoints = run / STAGE / "train.partial/checkpoints"
    assert lab.interrupted(run, lambda: (checkpoints / "checkpoint-6").is_dir()) == 143
    said = run.with_name("stopped.log").read_text()
    assert "SIGTERM: finishing this step and writing a checkpoint" in said
    assert said.endswith("distill run: stopped by SIGTERM; the same command continues\n")
    assert len(checkpoints_of(checkpoints)) == 2
    assert all(fault(path) is None for path in checkpoints_of(checkpoints).values())
    assert not (run / "run.lock").exists()
    return run


def test_stopped_by_sigterm(lab: Any, stopped: Path, tmp_path: Path) -> None:
    """And continued at another place."""
    run = shutil.copytree(stopped, tmp_path / "elsewhere")
    code, said = lab.finish(run)
    assert (code, lab.differences(run)) == (0, [])
    assert f"continuing from {run / STAGE}" in said


@pytest.mark.parametrize("how", ["torn", "flipped", "lost", "all flipped"])
def test_a_damaged_checkpoint_is_passed_over(lab: Any, stopped: Path, tmp_path: Path, how: str) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    found = list(checkpoints_of(run / STAGE / "train.partial/checkpoints").values())
    rng = random.Random(f"{how}")
    for checkpoint in found if how == "all flipped" else found[:1]:
        victim = rng.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size))
        content = bytearray(victim.read_bytes())
        if how == "torn":
            victim.write_bytes(content[: rng.randrange(len(content))])
        elif how == "lost":
            victim.unlink()
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            victim.write_bytes(content)
    code, said = lab.finish(run)
    assert f"{found[0]} is passed over" in said
    assert ("no checkpoint is whole: beginning anew" if how == "all flipped" else f"continuing from {found[1]}") in said
    assert (code, lab.differences(run)) == (0, [])


def test_stopped_by_sigint_while_scoring(lab: Any) -> None:
    run = lab.folder / "interrupted"
    assert lab.interrupted(run, (run / STAGE / "score.partial").is_dir, signal.SIGINT) == 130
    assert "stopped by SIGINT; the same command continues" in run.with_name("interrupted.log").read_text()
    assert lab.finish(run)[0] == 0
    assert lab.differences(run) == []
