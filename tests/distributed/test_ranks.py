"""Two processes train as one does; what cannot be shared is refused before anything is done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.launch import verdict
from stages.cli import main
from tests.distributed.conftest import ROOT, STAGE, apart, command, environment, train, weights

Copy = Callable[[str], Path]


def test_two_processes_train_as_one(copy: Copy) -> None:
    """Unequal shares of valid targets, two micro-batches each, groups with rates of their own, one of them frozen."""
    one, two = copy("one"), copy("two")
    options = ["train.learning_rates={mixers: 3.0e-3}", "train.freeze=[norms]", "train.keep_steps=[3]"]
    assert main(["train", str(one), *options]) == 0
    code, said = train(2, two, *options, "train.gradient_accumulation=2", "train.save_steps=4")
    assert code == 0, said
    assert apart(one, two) < 1e-4
    first, second = (json.loads((run / STAGE / "train/train.json").read_text()) for run in (one, two))
    assert second["engine"] == "ddp" and second["processes"] == 2
    for key in ("eval_loss_start", "eval_loss_end"):
        assert second[key] == pytest.approx(first[key], rel=1e-4)
    assert second["eval_loss_end"] < second["eval_loss_start"]
    lines = [[json.loads(line) for line in (run / STAGE / "train/log.jsonl").open()] for run in (one, two)]
    for ours, theirs in zip(*lines, strict=True):
        for key in ours.keys() - {"tokens_per_second", "minutes"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3), (key, ours)
    assert (two / STAGE / "train/steps/000003/model.safetensors").is_file()
    start = weights(two, "swap")
    still = {name for name, tensor in weights(two).items() if tensor.equal(start[name])}
    assert still == {name for name in start if "norm" in name and "self_attn" not in name}
    assert said.count("norms") == 1, "the table of what is trained is printed once"


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_same_whoever_prepares_them(copy: Copy, workers: int) -> None:
    run = copy("run")
    assert main(["train", str(run), f"train.data_workers={workers}", "train.steps=3"]) == 0
    losses = [json.loads(line)["loss"] for line in (run / STAGE / "train/log.jsonl").open() if '"loss"' in line]
    SEEN.append(losses)
    assert all(seen == SEEN[0] for seen in SEEN)


SEEN: list[list[float]] = []


def test_exit_codes() -> None:
    """What a launcher says of processes that ended with these codes, by rank."""
    assert verdict({0: 75, 1: -15}) == (75, "")
    assert verdict({0: 143, 1: 2}) == (2, "")
    assert verdict({0: -15, 1: 143}) == (143, "")
    code, text = verdict({0: 143, 1: -9})
    assert code == 76 and "rank 1 by SIGKILL" in text and "rank 0" not in text


def test_engines_that_need_a_launcher_say_so(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(copy("run")), "engine.name=fsdp", "kernels=reference"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["full", "grad_op"])
def test_fsdp_trains_as_one_process_and_goes_on(swapped: Path, tmp_path: Path, config: str) -> None:
    """Stopped by SIGUSR1 on the way, it goes on from its own checkpoint."""
    given = str(swapped.with_name("tiny.yaml"))
    for verb in ("score", "place", "swap"):
        assert main([verb, given, f"run_dir={tmp_path}/one", "kernels=reference"]) == 0
    two = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    assert main(["train", str(tmp_path / "one")]) == 0
    options = ("engine.name=fsdp", f"engine.config={config}", "train.save_steps=2")
    process = subprocess.Popen(command(2, two, *options), cwd=ROOT, env=environment())
    while not (two / STAGE / "train.partial/checkpoints/checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 75
    code, said = train(2, two, *options)
    assert code == 0 and "continuing from" in said, said
    assert apart(tmp_path / "one", two) < 1e-4


def test_two_processes_score_as_one(swapped: Path, tmp_path: Path) -> None:
    """Each takes every other candidate, of LOO and of MMR in lockstep; the records are those of one process."""
    given, found = str(swapped.with_name("tiny.yaml")), []
    options = ["score.compare=[mmr trainable=mixer steps=2]", "score.mmr.heldout_tokens=128"]
    for processes, name in ((1, "one"), (2, "two")):
        launch = command(processes, tmp_path / name, *options)
        launch[launch.index("train") : launch.index("train") + 2] = ["score", given, f"run_dir={tmp_path / name}"]
        done = subprocess.run(launch, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append((tmp_path / name / STAGE / "score/scores.json").read_bytes())
        assert done.stdout.count("scoring 3 blocks") == (2 if processes == 1 else 0)
        assert done.stdout.count("scoring 2 blocks") == done.stdout.count("scoring 1 blocks") == 2 * (processes - 1)
    assert found[0] == found[1]
