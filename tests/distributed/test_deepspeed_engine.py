"""DeepSpeed as the engine of ``distill train``: every ZeRO stage ends as one process does, and goes on by another
number of processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.cli import main
from tests.distributed.conftest import ROOT, STAGE, apart, check_best, check_tuned, command, environment, train, weights

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'distill-hybrid[deepspeed]'"),
]
Copy = Callable[[str], Path]
OPTIONS = ("train.learning_rates={mixers: 3.0e-3}", "train.freeze=[embeddings]", "train.gradient_accumulation=2")
BEST = ("train.save_steps=3", "train.keep_best=true")


@pytest.fixture(scope="module")
def one(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without an engine ends with."""
    run = shutil.copytree(swapped, tmp_path_factory.mktemp("one") / "one")
    assert main(["train", str(run), *OPTIONS, *BEST]) == 0
    return run


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_stage_trains_as_one_process(one: Path, copy: Copy, config: str) -> None:
    """With a sharded teacher under ZeRO-3."""
    two = copy("two")
    code, said = train(
        2, two, *OPTIONS, "engine.name=deepspeed", f"engine.config={config}", "train.keep_steps=[3]", *BEST
    )
    assert code == 0, said
    assert apart(one, two) < 1e-4
    check_best(one, two)
    first, second = (json.loads((run / STAGE / "train/train.json").read_text()) for run in (one, two))
    assert second["eval_loss_end"] == pytest.approx(first["eval_loss_end"], rel=1e-4)
    assert second["eval_loss_start"] == pytest.approx(first["eval_loss_start"], rel=1e-4)
    start, end = weights(two, "swap/checkpoint"), weights(two)
    assert end["model.embed_tokens.weight"].equal(start["model.embed_tokens.weight"]), "it was frozen"


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_goes_on_by_another_number_of_processes(one: Path, copy: Copy, config: str) -> None:
    """Stopped by SIGUSR1 in the middle by two, finished by one: moments, counters, decay and rates are those they
    were, and what is frozen, which no universal checkpoint holds."""
    run = copy("run")
    options = (*OPTIONS, "engine.name=deepspeed", f"engine.config={config}", "train.save_steps=2")
    process = subprocess.Popen(command(2, run, *options), cwd=ROOT, env=environment())
    partial = run / STAGE / "train.partial/checkpoints"
    while not (partial / "checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 75
    code, said = train(1, run, *options)
    assert code == 0 and "continuing from" in said, said
    assert not list((run / STAGE).rglob("universal*"))
    assert apart(one, run) < 1e-4


@pytest.mark.parametrize(("config", "processes"), [("zero2", 2), ("zero3", 2), ("zero3", 1)])
def test_it_fine_tunes_as_one_process(one: Path, tmp_path: Path, config: str, processes: int) -> None:
    """Through TRL, the student's head in parts under ZeRO-3."""
    alone, shared = (Path(shutil.copytree(one, tmp_path / name)) for name in ("alone", "shared"))
    assert main(["sft", str(alone)]) == 0
    code, said = train(processes, shared, "engine.name=deepspeed", f"engine.config={config}", verb="sft")
    assert code == 0, said
    check_tuned(alone, shared, "deepspeed", processes)


def test_bfloat16_trains_on_float32_weights(swapped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for verb in ("score", "place", "swap"):
        assert main([verb, str(swapped.with_name("tiny.yaml")), f"run_dir={run}", "dtype=bfloat16"]) == 0
    code, said = train(2, run, *OPTIONS, "engine.name=deepspeed", "engine.config=zero2")
    assert code == 0, said
    assert {str(tensor.dtype) for tensor in weights(run).values()} == {"torch.float32"}
    record = json.loads((run / STAGE / "train/train.json").read_text())
    assert record["eval_loss_end"] < record["eval_loss_start"]
