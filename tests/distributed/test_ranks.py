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
from tests.distributed.conftest import ROOT, STAGE, apart, check_best, check_tuned, command, environment, train, weights

Copy = Callable[[str], Path]


def test_two_processes_train_as_one(copy: Copy) -> None:
    """Unequal shares of valid targets, two micro-batches each, groups with rates of their own, one of them frozen."""
    one, two = copy("one"), copy("two")
    options = ["train.learning_rates={mixers: 3.0e-3}", "train.freeze=[norms]", "train.keep_steps=[3]"]
    options += ["train.save_steps=3", "train.keep_best=true"]
    assert main(["train", str(one), *options]) == 0
    code, said = train(2, two, *options, "train.gradient_accumulation=2")
    assert code == 0, said
    assert apart(one, two) < 1e-4
    check_best(one, two)
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
    start = weights(two, "swap/checkpoint")
    still = {name for name, tensor in weights(two).items() if tensor.equal(start[name])}
    assert still == {name for name in start if "norm" in name and "self_attn" not in name}
    assert said.count("norms") == 1, "the table of what is trained is printed once"


@pytest.fixture(scope="module")
def tuned(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was distilled, and (beside it, ``tuned``) fine-tuned by one process."""
    run = Path(shutil.copytree(swapped, tmp_path_factory.mktemp("tuned") / "distilled"))
    assert main(["train", str(run)]) == 0
    shutil.copytree(run, run.with_name("tuned"))
    assert main(["sft", str(run.with_name("tuned"))]) == 0
    return run.with_name("tuned")


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tuned: Path, tmp_path: Path) -> None:
    """Through TRL; the first process alone merges and measures."""
    two = Path(shutil.copytree(tuned.with_name("distilled"), tmp_path / "two"))
    code, said = train(2, two, "sft.save_steps=2", verb="sft")
    assert code == 0, said
    check_tuned(tuned, two, "ddp", 2)
    assert said.count("held-out cross_entropy before") == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", ["full", "grad_op"])
def test_fsdp_fine_tunes_as_one_process(swapped: Path, tmp_path: Path, config: str) -> None:
    one = tmp_path / "one"
    for verb in ("score", "place", "swap", "train"):
        assert main([verb, str(swapped.with_name("tiny.yaml")), f"run_dir={one}", "kernels=reference"]) == 0
    two = Path(shutil.copytree(one, tmp_path / "two"))
    assert main(["sft", str(one)]) == 0
    code, said = train(2, two, "engine.name=fsdp", f"engine.config={config}", verb="sft")
    assert code == 0, said
    check_tuned(one, two, "fsdp", 2)


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
    for others in (143, 76):  # ended by torchrun, or by itself, because it missed the other
        code, text = verdict({0: others, 1: -9})
        assert code == 76 and "rank 1 by SIGKILL" in text and "rank 0" not in text


def test_engines_that_need_a_launcher_say_so(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(copy("run")), "engine.name=fsdp", "kernels=reference"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.fixture(scope="module")
def in_one(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process ends with, by the kernels that FSDP2 can have on a CPU."""
    run = tmp_path_factory.mktemp("one") / "one"
    for verb in ("score", "place", "swap"):
        assert main([verb, str(swapped.with_name("tiny.yaml")), f"run_dir={run}", "kernels=reference"]) == 0
    shutil.copytree(run, run.with_name("swapped"))
    assert main(["train", str(run), *FSDP_OPTIONS]) == 0
    return run


FSDP_OPTIONS = ("train.freeze=[embeddings]", "train.save_steps=2", "train.keep_best=true", "train.on_bad_loss=skip")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "first", "then"), [("full", 2, 2), ("grad_op", 2, 2), ("full", 2, 1), ("full", 1, 2), ("grad_op", 2, 1)]
)
def test_fsdp_trains_as_one_process_and_goes_on(
    in_one: Path, tmp_path: Path, config: str, first: int, then: int
) -> None:
    """Stopped by SIGUSR1 on the way, it goes on from its own checkpoint, on as many processes or another number; what
    is frozen stays."""
    run = shutil.copytree(in_one.with_name("swapped"), tmp_path / "run")
    options = ("engine.name=fsdp", f"engine.config={config}", *FSDP_OPTIONS)
    process = subprocess.Popen(command(first, run, *options), cwd=ROOT, env=environment())
    while not (run / STAGE / "train.partial/checkpoints/checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 75
    code, said = train(then, run, *options)
    assert code == 0 and "continuing from" in said, said
    assert apart(in_one, run) < 1e-4
    check_best(in_one, run)
    start, end = weights(run, "swap/checkpoint"), weights(run)
    assert end["model.embed_tokens.weight"].equal(start["model.embed_tokens.weight"]), "it was frozen"


@pytest.mark.slow
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
