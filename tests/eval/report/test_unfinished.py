"""Reports of runs that are not finished, and of folders whose records are missing or broken."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.errors import UserError
from eval import drawing
from eval.frames import loss_frame, stage_frame
from eval.plots import plots_of
from eval.report import table, write_report
from eval.runs import read_run
from eval.summary import missing
from eval.words import NOT_MEASURED

FIGURES = {"pareto", "tasks", "distance", "placement", "ranks", "importance-01", "importance-02"}
FIGURES |= {"loss", "throughput", "memory", "cost"}
DRAWN_OF_A_TEACHER = {"pareto", "tasks", "distance", "throughput", "memory", "cost"}


def test_teacher_only(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", stages={})
    write_report(run)
    assert {file.stem for file in (run / "report/figures").glob("*.png")} == DRAWN_OF_A_TEACHER
    assert "Only the teacher has been measured: 97.5% mean generative accuracy at 8,123 tokens/s" in runs.page(run)
    assert missing(read_run(run)) == ["stage 1, H1-5/10: not started", "stage 2, H1-7/10: not started"]


def test_a_stage_cut_short(runs: Any, partial: Path) -> None:
    (line,) = missing(read_run(partial))
    assert re.fullmatch(r"stage 2, H1-7/10: lacks train \(reached step \d+ of 200\), measure", line)
    write_report(partial)
    assert line in runs.page(partial) and line in (partial / "report/report.md").read_text()
    row = re.findall("<tr>.*?</tr>", runs.page(partial))[3]
    cells = re.findall("<td.*?>(.*?)</td>", row)
    assert cells == [NOT_MEASURED] * (len(runs.tasks) + 6)
    partial_log = loss_frame(read_run(partial))
    assert set(partial_log["model"]) == {"H1-5/10", "H1-7/10"}


@pytest.mark.parametrize("step", ["score", "place", "train", "measure"])
def test_any_step_may_be_missing(runs: Any, tmp_path: Path, step: str) -> None:
    run = runs.build(tmp_path / "run", steps=5)
    shutil.rmtree(run / "stages" / "01-H1-5" / step)
    shutil.rmtree(run / "teacher")
    records = read_run(run)
    drawn = [plot.name for plot in plots_of(records, stage_frame(records)) if plot.draw and plot.draw(drawing.WIDE)]
    assert FIGURES - set(drawn) <= {"importance-01", "ranks", "pareto", "distance"}
    lines = missing(records)
    assert lines[0].startswith("the teacher") and lines[1].endswith(f"lacks {step}")
    assert table(run)


def test_an_empty_run(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: empty\nschedule: [5, 7]\n")
    write_report(tmp_path)
    assert runs.page(tmp_path).count(f'<p class="missing">{NOT_MEASURED}</p>') == 8
    assert not list((tmp_path / "report/figures").iterdir())


def test_steps_planned_by_stage(partial: Path, tmp_path: Path) -> None:
    run = shutil.copytree(partial, tmp_path / "run")
    (run / "run.yaml").write_text("schedule: [5, 7]\ntrain: {steps: 1, steps_by_stage: [200, 4000]}\n")
    assert "of 4,000)" in missing(read_run(run))[0]


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder} holds no records of a run"):
            write_report(folder)
        with pytest.raises(UserError, match="holds no records"):
            table(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("teacher/measure.json", "{", r"measure\.json cannot be read: .*; remove .*teacher and run its step again"),
        ("teacher/measure.json", "[]", "it holds a list instead of an object"),
        ("teacher/measure.json", '{"accuracy": [], "throughput": 3}', "no list 'throughput'"),
        ("teacher/measure.json", '{"accuracy": [{"task": "a"}], "throughput": []}', "'accuracy' without task and kind"),
        (
            "teacher/measure.json",
            '{"accuracy": [], "throughput": [], "by_distance": [{"task": "a", "n": 1}]}',
            "'by_distance' without task and distance and value and n",
        ),
        ("stages/01-H1-5/score/scores.json", '{"scorer": "loo"}', "no list 'blocks'"),
        ("stages/01-H1-5/place/placement.json", '{"mixers": []}', "no list 'added'"),
        ("stages/01-H1-5/train/log.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2 is not a JSON object"),
        ("stages/01-H1-5/train/log.jsonl", '{"step": 1}\n7\n{"step": 3}\n', "line 2 is not a JSON object"),
        (
            "teacher/measure.json",
            '{"accuracy": [], "throughput": [], "serving": {"memory": [{"model": "teacher", "batch": 1}]}}',
            "an entry of 'memory' without model and batch and tokens",
        ),
        (
            "teacher/measure.json",
            '{"accuracy": [{"task": "a", "kind": "generative", "value": NaN}], "throughput": []}',
            "value=nan, expected a fraction",
        ),
        (
            "teacher/measure.json",
            '{"accuracy": [], "throughput": [], "headline": {"ratio": Infinity}}',
            "ratio=inf, expected a finite number",
        ),
        ("teacher/step.json", "[]", "step.json is broken, it holds no object"),
        ("run.yaml", "a: [", r"run\.yaml cannot be read"),
        ("run.yaml", "[1]", "holds a list, expected a mapping"),
    ],
)
def test_broken_records_are_named(runs: Any, tmp_path: Path, file: str, text: str, message: str) -> None:
    run = runs.build(tmp_path / "run", steps=3)
    (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert not (run / "report").exists()


def test_a_fine_tuning_that_was_cut_short_is_missing(runs: Any, tmp_path: Path) -> None:
    run = runs.tune(runs.build(tmp_path / "run"), 1, 0.98, 1.42, steps=())
    config = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**config, "sft": {"steps": 300}}))
    assert missing(read_run(run)) == ["H1-5/10-SFT: lacks train (reached step 100 of 300), merge, measure"]
    line = next(line for line in table(run).splitlines() if line.startswith("H1-5/10-SFT"))
    assert NOT_MEASURED in line
