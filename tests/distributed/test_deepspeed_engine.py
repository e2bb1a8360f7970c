"""DeepSpeed as the engine of ``distill train``: every ZeRO stage ends as one process does, and goes on by another
number of processes."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.cli import main
from tests.distributed.conftest import ROOT, STAGE, apart, command, environment, train, weights

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'distill-hybrid[deepspeed]'"),
]
Copy = Callable[[str], Path]
OPTIONS = ("train.learning_rates={mixers: 3.0e-3}", "train.freeze=[embeddings]", "train.gradient_accumulation=2")


@pytest.fixture(scope="module")
def one(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without an engine ends with."""
    import shutil

    run = shutil.copytree(swapped, tmp_path_factory.mktemp("one") / "one")
    assert main(["train", str(run), *OPTIONS]) == 0
    return run


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_stage_trains_as_one_process(one: Path, copy: Copy, config: str) -> None:
    """With a sharded teacher under ZeRO-3."""
    two = copy("two")
    code, said = train(2, two, *OPTIONS, "engine.name=deepspeed", f"engine.config={config}", "train.keep_steps=[3]")
    assert code == 0, said
    assert apart(one, two) < 1e-4
    first, second = (json.loads((run / STAGE / "train/train.json").read_text()) for run in (one, two))
    assert second["eval_loss_end"] == pytest.approx(first["eval_loss_end"], rel=1e-4)
    assert second["eval_loss_start"] == pytest.approx(first["eval_loss_start"], rel=1e-4)
    start, end = weights(two, "swap"), weights(two)
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
    assert process.wait(120) == 75
    code, said = train(1, run, *options)
    assert code == 0 and "continuing from" in said, said
    assert not list((run / STAGE).rglob("universal*"))
    assert apart(one, run) < 1e-4


def test_bfloat16_trains_on_float32_weights(copy: Copy) -> None:
    run = copy("run")
    code, said = train(2, run, *OPTIONS, "engine.name=deepspeed", "engine.config=zero2", "dtype=bfloat16", "--force")
    assert code == 0, said
    assert {str(tensor.dtype) for tensor in weights(run).values()} == {"torch.float32"}
