"""Candidates scored apart, as the tasks of a job array do, and joined: the scores of one process, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import lock
from distill.importance import apart, available, join
from stages import ledger
from stages.cli import main
from stages.jobs import Job
from stages.status import Row, advice

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def unscored(tiny: Path, tmp_path: Path) -> Callable[[int], tuple[Path, bytes]]:
    """``unscored(stage)``: a copy of the finished run without that stage's scores, and what they were."""

    def make(stage: int) -> tuple[Path, bytes]:
        run = tmp_path / "run"
        shutil.copytree(tiny / "run", run)
        folder = next(run.glob(f"stages/{stage:02d}-*/score"))
        before = (folder / "scores.json").read_bytes()
        shutil.rmtree(folder)
        return run, before

    return make


def score(run: Path, stage: int, *more: str) -> int:
    return main(["score", str(run), "--stage", str(stage), *more])


@pytest.mark.parametrize(("stage", "count"), [(1, 3), (2, 2)], ids=["loo", "mmr"])
def test_candidates_apart_are_candidates_together(
    stage: int, count: int, unscored: Callable[[int], tuple[Path, bytes]], capsys: Capture
) -> None:
    run, before = unscored(stage)
    for index in reversed(range(count)):
        assert score(run, stage, "--candidate", str(index)) == 0
    assert score(run, stage, "--candidate", "0") == 0, "once more"
    assert "is scored already" in capsys.readouterr().out
    folder = next(run.glob(f"stages/{stage:02d}-*/score.partial"))
    assert sorted(path.name for path in (folder / "candidates").iterdir()) == [f"{i:03d}.json" for i in range(count)]
    assert score(run, stage) == 0
    assert f"{count} of {count} candidates are scored already" in capsys.readouterr().out
    done = folder.with_name("score")
    assert (done / "scores.json").read_bytes() == before
    assert not folder.exists() and sorted(path.name for path in done.iterdir()) == [
        "importance.parquet",
        "scores.json",
        "step.json",
    ]


def test_what_is_missing_is_scored_as_they_are_joined(unscored: Callable[[int], tuple[Path, bytes]]) -> None:
    run, before = unscored(2)
    assert score(run, 2, "--candidate", "1") == 0
    assert score(run, 2) == 0
    assert next(run.glob("stages/02-*/score/scores.json")).read_bytes() == before


def test_candidates_of_other_inputs_do_not_count(unscored: Callable[[int], tuple[Path, bytes]]) -> None:
    run, before = unscored(1)
    assert score(run, 1, "--candidate", "0") == 0
    part = next(run.glob("stages/01-*/score.partial/candidates/000.json"))
    record = json.loads(part.read_text())
    record["record"]["blocks"][0]["score"] = 7.0
    part.write_text(json.dumps({**record, "fingerprint": "another"}))
    assert score(run, 1, "--candidate", "0") == 0
    assert json.loads(part.read_text())["fingerprint"] == record["fingerprint"], "it is scored again"
    part.write_text(json.dumps({**record, "fingerprint": "another"}))
    assert score(run, 1) == 0
    assert next(run.glob("stages/01-*/score/scores.json")).read_bytes() == before


def test_a_candidate_and_a_whole_score_do_not_work_at_once(
    unscored: Callable[[int], tuple[Path, bytes]], capsys: Capture
) -> None:
    run, _ = unscored(1)
    step = next(run.glob("stages/01-*")) / "score.partial"
    (step / "candidates").mkdir(parents=True)
    other = {**lock.myself(), "pid": os.getppid(), "started": lock.started(os.getppid())}
    (step / "candidates" / "001.lock").write_text(json.dumps(other))
    assert score(run, 1) == 2
    assert "candidate 1 of 01-H1-1/score is in use" in capsys.readouterr().err
    assert score(run, 1, "--candidate", "1") == 2
    assert "candidate 1 of 01-H1-1/score is in use" in capsys.readouterr().err
    (run / "run.lock").write_text(json.dumps(other))
    assert score(run, 1, "--candidate", "0") == 2
    assert f"{run} is in use" in capsys.readouterr().err
    assert not list((step / "candidates").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--candidate", "0"], "--candidate needs --stage"),
        (["{run}", "--stage", "1", "--candidate", "3"], "no candidate 3; expected a value in [0, 3)"),
        (["{run}", "--stage", "1", "--candidate", "-1"], "no candidate -1"),
        (["{run}", "--stage", "1", "--candidate", "0", "--force"], "without --candidate"),
        (["{run}", "--stage", "9", "--candidate", "0"], "no stage '9'"),
        (["smoke", "--stage", "1", "--candidate", "0"], "smoke is no run folder"),
    ],
)
def test_no_such_candidate(
    arguments: list[str], message: str, unscored: Callable[[int], tuple[Path, bytes]], capsys: Capture
) -> None:
    run, _ = unscored(1)
    assert main(["score", *(part.format(run=run) for part in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_every_score_can_be_joined() -> None:
    """Each that scores apart has an order of its own; shared figures and the order of keys are those of one record."""
    rows = [
        {"block": block, "score": score, "stderr": 0.1, "loglikelihood": -float(block), "loss_end": score}
        for block, score in ((4, 0.5), (1, 0.9), (2, 0.1))
    ]
    for name in filter(apart, available()):
        records = [{"scorer": name, "blocks": [row], "order": [row["block"]], "questions": 4} for row in rows]
        joined = join(name, records)
        assert list(joined) == ["scorer", "blocks", "order", "questions"]
        assert [row["block"] for row in joined["blocks"]] == [1, 2, 4]
        assert joined["order"] == [2, 4, 1]


def test_a_killed_candidate_is_named_and_scored_alone(
    unscored: Callable[[int], tuple[Path, bytes]], capsys: Capture
) -> None:
    """What a task of a job array leaves that was killed: a lock of a process that is gone, and no record."""
    run, before = unscored(2)
    for index in (0, 1):
        assert score(run, 2, "--candidate", str(index)) == 0
    folder = next(run.glob("stages/02-*/score.partial/candidates"))
    (folder / "001.json").unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (folder / "001.lock").write_text(json.dumps({**lock.myself(), "pid": gone.pid, "started": 0.0}))
    job = Job("02-H1-2/score", "r-02-H1-2-score", (), (0, 1))
    assert ledger.unscored(run, job) == [1]
    shown = Row(job, "1 of 2", "7_1", "CANCELLED", log=str(run / "none"))
    assert f"candidates without a score: 1; one alone: distill score {run} --stage 2 --candidate 1" in advice(
        run, [shown], asked=True
    )
    assert score(run, 2, "--candidate", "1") == 0
    assert score(run, 2) == 0
    assert next(run.glob("stages/02-*/score/scores.json")).read_bytes() == before
