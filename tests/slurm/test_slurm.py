"""A small run through a real Slurm: arrays, dependencies, a failure, a preemption; equal to the run without it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distill.config import SlurmConfig
from stages.jobs import Job, batch_script

from .conftest import ask, distill, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]


def submitted(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "jobs/jobs.json").read_text())["jobs"]


def state(number: int | str) -> str:
    """What squeue says of a job; of all tasks of a job array."""
    found = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", "--format=%T").split()
    return " ".join(sorted(set(found)))


def test_a_run_through_a_failure_and_a_preemption_ends_like_one_without(config: Path, tmp_path: Path) -> None:
    run, flag = tmp_path / "submitted", tmp_path / "mended"
    broken = f"if [[ $SLURM_JOB_NAME == *02-H1-2-swap && ! -e {flag} ]]; then echo no luck; exit 9; fi"
    where = [config, f"run_dir={run}", f"slurm.setup=['{broken}']"]
    done = distill("submit", *where)
    assert done.returncode == 0, done.stderr
    jobs = {entry["key"]: entry for entry in submitted(run)}
    assert [entry["key"] for entry in submitted(run)] == [
        *(f"{stage}/{kind}" for stage in ("01-H1-1", "02-H1-2") for kind in ("score", "swap", "train", "measure")),
        "report",
    ]

    train, log = jobs["01-H1-1/train"]["id"], run / "stages/01-H1-1/train.partial/log.jsonl"
    wait_for("the training", lambda: log.exists() and len(log.read_text().splitlines()) > 20)
    ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_for("its checkpoint", lambda: list(log.parent.glob("checkpoints/checkpoint-*")))
    printed = run / f"jobs/01-H1-1-train-{train}.out"
    wait_for("its second start", lambda: "continuing from" in printed.read_text())
    assert "back to the queue, to go on from the newest checkpoint" in printed.read_text()

    swap, last = jobs["02-H1-2/swap"]["id"], jobs["report"]["id"]
    wait_for("the failure", lambda: state(swap) == "FAILED")
    wait_for("the end of what waits for it", lambda: state(last) == "CANCELLED")
    said = distill("status", run).stdout
    assert "02-H1-2/swap has not succeeded (FAILED)" in said and "  no luck" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("01-H1-1/")] == ["done"] * 4

    flag.touch()
    count = len(submitted(run))
    assert distill("submit", run).returncode == 0
    again = submitted(run)[count:]
    assert [entry["key"] for entry in again] == ["02-H1-2/swap", "02-H1-2/train", "02-H1-2/measure", "report"]
    done = distill("submit", run)
    assert "nothing to submit: jobs are under way" in done.stdout and len(submitted(run)) == count + 4
    wait_for("the report", lambda: state(again[-1]["id"]) == "COMPLETED")
    assert "everything is finished" in distill("status", run).stdout

    plain = config.parent / "plain"
    assert distill("run", config).returncode == 0
    compared = [*plain.rglob("*.safetensors"), *plain.rglob("scores.json"), *plain.rglob("placement.json")]
    assert len(compared) == 8
    for file in compared:
        assert file.read_bytes() == (run / file.relative_to(plain)).read_bytes(), file
    for file in plain.rglob("train.json"):
        ours, theirs = (json.loads(path.read_text()) for path in (file, run / file.relative_to(plain)))
        assert {**ours, "minutes": 0} == {**theirs, "minutes": 0}
    for file in plain.rglob("measure.json"):
        ours, theirs = (json.loads(path.read_text())["accuracy"] for path in (file, run / file.relative_to(plain)))
        assert ours == theirs
    if shutil.which("sacct"):
        states = ask(
            "sacct", "--noheader", "--duplicates", "--allocations", f"--jobs={train}", "--format=State"
        ).split()
        assert "REQUEUED" in states and states[-1] == "COMPLETED"


def test_two_nodes_get_the_signal_and_go_on(tmp_path: Path) -> None:
    """torchrun on both nodes, a rank each: the signal reaches the ranks, their exit code the batch script."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import os, signal, sys, time, torch, torch.distributed as dist
def stop(number, frame):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the scheduler's, and once more the batch script's
    open("{tmp_path}/asked" + os.environ["RANK"], "w").close()
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
dist.init_process_group("gloo")
total = torch.ones(1); dist.all_reduce(total)
open(f"{tmp_path}/ready{{os.environ['RANK']}}", "w").write(str(total.item()))
again = os.environ.get("SLURM_RESTART_COUNT")
time.sleep(0 if again else 120)
""")
    slurm = SlurmConfig(nodes=2, gpus_per_node=0, cpus_per_task=1, memory="500M", time="10")
    job = Job("01-H1-1/train", "two", (("train", "RUN"),))
    text = batch_script(slurm, job, tmp_path).replace("-m stages.cli train RUN", str(worker))
    number = subprocess.run(
        ["sbatch", "--parsable"], input=text, text=True, capture_output=True, check=True
    ).stdout.strip()
    wait_for("both ranks", lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    assert (tmp_path / "ready1").read_text() == "2.0"
    ask("scancel", "--signal=USR1", "--batch", number)
    wait_for("its end", lambda: state(number) == "COMPLETED")
    printed = (tmp_path / f"01-H1-1-train-{number}.out").read_text()
    assert "exit code 75: back to the queue" in printed
    assert (tmp_path / "asked0").exists() and (tmp_path / "asked1").exists()


def test_a_cancelled_training_stays_cancelled_and_is_gone_on_with(config: Path, tmp_path: Path) -> None:
    run, long = tmp_path / "cancelled", "train.steps_by_stage=[20000, 4]"  # `distill cancel` itself takes seconds
    for step in ("score", "place", "swap"):
        assert distill(step, config, f"run_dir={run}", long, "--stage", 1).returncode == 0
    assert distill("submit", run).returncode == 0
    train = submitted(run)[0]["id"]
    log = run / "stages/01-H1-1/train.partial/log.jsonl"
    wait_for("the training", lambda: log.exists() and len(log.read_text().splitlines()) > 20)
    assert "01-H1-1/train" in distill("cancel", run).stdout
    wait_for("its end", lambda: state(train) == "CANCELLED")
    assert list(log.parent.glob("checkpoints/checkpoint-*")), "it was given time for a checkpoint"
    assert "01-H1-1/train has not succeeded (CANCELLED)" in distill("status", run).stdout
    assert distill("submit", run).returncode == 0
    last = submitted(run)[-1]
    assert distill("cancel", run).returncode == 0
    wait_for("the cancellation", lambda: state(last["id"]) == "CANCELLED")


def test_bad_input_before_anything_is_submitted(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ["submit", config, f"run_dir={tmp_path}/run"]
    for more, message in (
        (["slurm.partition=mian"], "no such partition (did you mean 'main'?); it has main, urgent"),
        (["slurm.nodes=4"], "the scheduler refuses a job of kind 'train'"),
    ):
        done = distill(*where, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    settings = Path(ask("printenv", "SLURM_CONF"))
    away = tmp_path / "slurm.conf"
    away.write_text(settings.read_text().replace("SlurmctldPort=16817", "SlurmctldPort=16999"))
    monkeypatch.setenv("SLURM_CONF", str(away))
    done = distill(*where)
    assert done.returncode == 2 and "the scheduler does not answer" in done.stderr and "--dry-run" in done.stderr
    assert not (tmp_path / "run").exists() and "small" not in ask("env", f"SLURM_CONF={settings}", "squeue")
