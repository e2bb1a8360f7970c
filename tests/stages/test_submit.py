"""Submission, status and cancellation with stand-ins for the scheduler's commands; the real ones are in tests/slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import lock
from stages import slurm
from stages.cli import main

Capture = pytest.CaptureFixture[str]

STAND_INS = {
    "sinfo": 'cat "$FAKE/partitions"',
    "squeue": 'cat "$FAKE/queue"',
    "sacct": 'echo "Slurm accounting storage is disabled" >&2; exit 1',
    "scancel": 'echo "$@" >> "$FAKE/cancelled"',
    "sbatch": """
if [[ -e $FAKE/refuse ]]; then cat > /dev/null; cat "$FAKE/refuse" >&2; exit 1; fi
if [[ $1 == --test-only ]]; then cat > /dev/null; exit; fi
id=$(($(cat "$FAKE/last") + 1)); echo $id > "$FAKE/last"
script=$(cat); name=$(grep -o 'job-name=.*' <<< "$script" | cut -d= -f2 | tr -d "'")
array=$(grep -o 'array=.*' <<< "$script" | cut -d= -f2 || true)
echo "$id $name ${array:--} ${2#--dependency=}" >> "$FAKE/submitted"
for index in $(case ${array:-} in "") echo N/A;; *-*) seq ${array/-/ };; *) echo ${array/,/ };; esac); do
    echo "$id|$index|PENDING|0:00||Dependency|$name" >> "$FAKE/queue"
done
echo "$id"
""",
}


class Cluster:
    """The stand-ins' state: what was submitted and cancelled, and what the queue says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"partitions": "gpu\ncpu\nlong\n", "queue": "", "last": "100", "submitted": ""}.items():
            (folder / name).write_text(text)

    def submitted(self) -> list[list[str]]:
        """(id, name, array, dependency) of every job since the last call."""
        found = [line.split() for line in (self.folder / "submitted").read_text().splitlines()]
        (self.folder / "submitted").write_text("")
        return found

    def queue(self, *lines: str) -> None:
        """What squeue says from now on: id|index|state|time|nodes|reason|name."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def cancelled(self) -> list[str]:
        file = self.folder / "cancelled"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    commands = tmp_path / "cluster"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\nset -e\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(commands))
    return Cluster(commands)


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(*gone)``: a copy of the finished run without the steps that the patterns name."""

    def make(*gone: str) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(tiny / "run", folder)
        for pattern in gone:
            for path in folder.glob(pattern):
                shutil.rmtree(path)
        return folder

    return make


def submit(target: Path | str, *more: str) -> int:
    return main(["submit", str(target), "slurm.partition=gpu", *more])


def test_a_new_run_is_submitted_whole(cluster: Cluster, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    new = tmp_path / "new"
    assert submit(tiny / "tiny.yaml", f"run_dir={new}") == 0
    found, stages = cluster.submitted(), ("01-H1-1", "02-H1-2")
    kinds = [f"tiny-{stage}-{kind}" for stage in stages for kind in ("score", "swap", "train", "measure")]
    assert [job[1] for job in found] == [*kinds, "tiny-report"]
    assert [job[2] for job in found] == ["0-2", "-", "-", "-", "0-1", "-", "-", "-", "-"]
    assert [job[3:] for job in found] == [[], *([f"afterok:{job[0]}"] for job in found[:-1])]
    jobs = json.loads((new / "jobs/jobs.json").read_text())["jobs"]
    assert [job["id"] for job in jobs] == list(range(101, 110)) and jobs[0]["key"] == "01-H1-1/score"
    assert "--candidate" in (new / "jobs/01-H1-1-score.sh").read_text()
    assert "partition: gpu" in (new / "run.yaml").read_text() and "threads: 1" in (new / "run.yaml").read_text()
    assert not (new / "run.lock").exists() and not (new / "jobs/submit.lock").exists()
    assert f"distill status {new}" in capsys.readouterr().out
    assert submit(new) == 0
    assert cluster.submitted() == [], "nothing is doubled"
    assert "nothing to submit: jobs are under way" in capsys.readouterr().out


def test_it_goes_on_from_what_is_finished(cluster: Cluster, run: Callable[..., Path], capsys: Capture) -> None:
    folder = run("stages/02-*/train", "stages/02-*/measure", "report")
    assert submit(folder) == 0
    found = cluster.submitted()
    assert [job[1].removeprefix("tiny-") for job in found] == ["02-H1-2-train", "02-H1-2-measure", "report"]
    assert len(found[0]) == 3, "the first waits for nothing"
    shutil.rmtree(folder / "jobs")
    cluster.queue()
    assert main(["status", str(folder)]) == 0
    assert f"nothing of it is submitted: distill submit {folder}" in capsys.readouterr().out


def test_a_finished_run_has_nothing_to_submit(cluster: Cluster, run: Callable[..., Path], capsys: Capture) -> None:
    folder = run()
    assert submit(folder) == 0
    assert cluster.submitted() == []
    assert "nothing to submit: everything is finished" in capsys.readouterr().out
    assert main(["status", str(folder)]) == 0
    assert "everything is finished" in capsys.readouterr().out


def test_after_a_failure_only_the_failed_candidates_and_what_follows(
    cluster: Cluster, run: Callable[..., Path], capsys: Capture
) -> None:
    folder = run("stages/02-*/*")
    assert submit(folder) == 0
    assert [job[2] for job in cluster.submitted()][:1] == ["0-1"]
    assert main(["score", str(folder), "--stage", "2", "--candidate", "0"]) == 0
    name = "tiny-02-H1-2"
    cluster.queue(
        f"101|0|COMPLETED|0:09|n1||{name}-score",
        f"101|1|FAILED|0:09|n1|NonZeroExitCode|{name}-score",
        f"102|N/A|PENDING|0:00||DependencyNeverSatisfied|{name}-swap",
        f"103|N/A|PENDING|0:00||Dependency|{name}-train",
        "999|N/A|RUNNING|0:00|n1||of-someone-else",
    )
    (folder / "jobs/02-H1-2-score-101_1.out").write_text("working\nit broke\n")
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    row = next(line.split() for line in text.splitlines() if line.startswith("02-H1-2/score"))
    assert row[1:5] == ["1", "of", "2", "101_1"] and "1 COMPLETED, 1 FAILED" in text
    assert "02-H1-2/score has not succeeded" in text and "  it broke\n" in text
    assert f"distill submit {folder}" in text and "someone-else" not in text
    assert submit(folder) == 0
    found = cluster.submitted()
    assert [job[1].removeprefix(f"{name}-") for job in found] == ["score", "swap", "train", "measure", "tiny-report"]
    assert found[0][2] == "1", "the candidate that failed, alone"
    assert cluster.cancelled() == ["103"], "what would wait for ever"


def test_live_tasks_of_an_array_are_waited_for_one_by_one(cluster: Cluster, run: Callable[..., Path]) -> None:
    folder = run("stages/*", "teacher", "report")
    assert submit(folder) == 0
    cluster.submitted()
    cluster.queue(
        "101|0|RUNNING|0:09|n1||tiny-01-H1-1-score",
        "101|1|FAILED|0:09|n1||tiny-01-H1-1-score",
        "101|2|PENDING|0:09|n1||tiny-01-H1-1-score",
    )
    assert submit(folder) == 0
    found = cluster.submitted()
    assert found[0][1:] == ["tiny-01-H1-1-score", "1"]
    assert found[1][3] == f"afterok:101_0:101_2:{found[0][0]}"
    assert cluster.cancelled() == []


def test_cancel_takes_what_lives_the_last_first(cluster: Cluster, run: Callable[..., Path], capsys: Capture) -> None:
    folder = run("stages/02-*/train", "stages/02-*/measure")
    assert submit(folder) == 0
    assert main(["cancel", str(folder)]) == 0
    assert cluster.cancelled() == ["103", "102", "101"]
    assert f"to go on: distill submit {folder}" in capsys.readouterr().out
    cluster.queue("101|N/A|CANCELLED|0:00|||tiny-02-H1-2-train")
    assert main(["cancel", str(folder)]) == 0
    assert "has no jobs that wait or work" in capsys.readouterr().out


def test_status_shows_the_step_of_a_training(cluster: Cluster, run: Callable[..., Path], capsys: Capture) -> None:
    folder = run("stages/02-*/train", "stages/02-*/measure")
    assert submit(folder) == 0
    name = "tiny-02-H1-2"
    cluster.queue(f"101|N/A|RUNNING|1:05|n7||{name}-train", f"102|N/A|PENDING|0:00||Dependency|{name}-measure")
    partial = folder / "stages/02-H1-2/train.partial"
    partial.mkdir()
    (partial / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step"')
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["02-H1-2/train"] == ["02-H1-2/train", "step", "1", "of", "2", "101", "RUNNING", "1:05", "n7"]
    assert rows["02-H1-2/measure"][1:] == ["-", "102", "PENDING", "0:00", "Dependency"]
    assert rows["01-H1-1/train"][1:] == ["done"]


def test_status_without_a_scheduler_shows_the_records(
    run: Callable[..., Path], capsys: Capture, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("stages/02-*/train", "stages/02-*/measure")
    assert submit(folder) == 0
    (folder / "jobs/02-H1-2-train-101.exit").write_text("1\n")
    (folder / "jobs/02-H1-2-train-101.out").write_text("it broke\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(slurm.subprocess, "run", without_slurm)
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["01-H1-1/measure"][1:] == ["done"]
    assert rows["02-H1-2/train"][1:] == ["-", "101", "exit", "code", "1"]
    assert "the run folder's records alone: no scheduler here" in text and "  it broke" in text


def without_slurm(command: list[str], **options: object) -> object:
    """``subprocess.run`` on a machine that has no Slurm, whatever this one has."""
    raise FileNotFoundError(command[0])


def rows_of(text: str) -> dict[str, list[str]]:
    """The table's rows, by their first word."""
    found = [line.split() for line in text.splitlines() if line.strip()]
    return {words[0]: words for words in reversed(found)}  # what is said of a step comes below its row


def refused(capsys: Capture, *command: str) -> str:
    """The message of a command that is refused: at most five lines, exit code 2."""
    capsys.readouterr()
    assert main(list(command)) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.count("\n") <= 5
    return text


def test_no_scheduler(tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.subprocess, "run", without_slurm)
    text = refused(capsys, "submit", str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new")
    assert "no scheduler here: sinfo is not on PATH" in text and "login node" in text and "--dry-run" in text
    assert not (tmp_path / "new").exists()
    assert main(["submit", str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1",
            "does not answer: Unable to contact",
        ),
        ("sleep 5", "does not answer: sinfo took over 1 s"),
    ],
)
def test_a_scheduler_that_does_not_answer(
    answer: str,
    message: str,
    cluster: Cluster,
    tiny: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT", 1.0)
    (cluster.folder / "sinfo").write_text(f"#!/bin/bash\nexec 2>&1\n{answer}\n")
    text = refused(capsys, "submit", str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new")
    assert message in text and "--dry-run" in text
    assert not (tmp_path / "new").exists() and cluster.submitted() == []


def test_an_unknown_partition_names_the_nearest(cluster: Cluster, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    where = ["submit", str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new"]
    text = refused(capsys, *where, "slurm.partition=gpus")
    assert "slurm.partition=gpus" in text and "did you mean 'gpu'" in text and "cpu, gpu, long" in text
    assert "did you mean 'long'" in refused(capsys, *where, "slurm.partition=gpu,lon")
    assert "did you mean 'cpu'" in refused(capsys, *where, "slurm.light_partition=cp")
    assert not (tmp_path / "new").exists() and cluster.submitted() == []


def test_what_the_scheduler_refuses_is_said_before_anything_is_submitted(
    cluster: Cluster, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    (cluster.folder / "refuse").write_text("allocation failure: Invalid account or account/partition combination\n")
    text = refused(capsys, "submit", str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new")
    assert "refuses a job of kind 'score'" in text and "Invalid account" in text
    assert cluster.submitted() == [] and not (tmp_path / "new").exists()


def test_a_run_folder_that_a_process_works_on(cluster: Cluster, run: Callable[..., Path], capsys: Capture) -> None:
    folder = run("stages/02-*/train")
    other = {**lock.myself(), "pid": os.getppid(), "started": lock.started(os.getppid()), "command": "distill run x"}
    (folder / "run.lock").write_text(json.dumps(other))
    text = refused(capsys, "submit", str(folder))
    assert f"{folder} is in use" in text and f"pid {os.getppid()}" in text and "by: distill run x" in text
    assert cluster.submitted() == [] and not (folder / "jobs").exists()
    (folder / "run.lock").unlink()
    assert submit(folder) == 0
    cluster.queue("101|N/A|RUNNING|0:05|n1||tiny-02-H1-2-train")
    (folder / "run.lock").write_text(json.dumps({**other, "job": "101"}))
    assert submit(folder) == 0, "a job of its own may work on it"


def test_a_run_folder_with_jobs_of_other_settings(
    cluster: Cluster, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    where = [str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new"]
    assert main(["submit", *where]) == 0
    cluster.submitted()
    text = refused(capsys, "submit", *where, "train.steps=3")
    assert "jobs under way that were submitted with other settings (101, 102, 103, 104, ...)" in text
    assert "train.steps: 2 -> 3" in text and "distill cancel" in text
    assert cluster.submitted() == [] and "steps: 3" not in (tmp_path / "new/run.yaml").read_text()
    assert main(["submit", *where, "slurm.time=01:00:00"]) == 0, "what a job takes may change"


def test_bad_input_is_found_before_the_queue(
    cluster: Cluster, tiny: Path, tmp_path: Path, run: Callable[..., Path], capsys: Capture
) -> None:
    """A teacher without a tokenizer, changed inputs: not hours later in a job's log."""
    where, bare = [str(tiny / "tiny.yaml"), f"run_dir={tmp_path}/new"], tmp_path / "bare"
    shutil.copytree(tiny / "teacher", bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(capsys, "submit", *where, f"teacher={bare}")
    assert "was made with other inputs" in refused(capsys, "submit", str(run()), "train.learning_rate=0.5")
    assert "no cluster 'h10'" in refused(capsys, "submit", *where, "--cluster", "h10")
    assert cluster.submitted() == [] and not (tmp_path / "new").exists()


def test_stand_ins_are_bash(cluster: Cluster) -> None:
    for name in STAND_INS:
        assert subprocess.run(["bash", "-n", str(cluster.folder / name)]).returncode == 0
