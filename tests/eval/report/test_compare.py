"""Several runs and models measured elsewhere beside each other, and what is refused of them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from distill.errors import UserError
from eval.compare import cautions, difference_frame, joint_frame, read_labels
from eval.drawing import EXTERNAL
from eval.external import read_external
from eval.figures.pareto import pareto
from eval.frames import stage_frame
from eval.report import joint_lead, joint_report, run_report, table
from eval.runs import read_run


@pytest.fixture(scope="module")
def other(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another mixer, seven blocks at once and faster; not to be changed."""
    run = runs.build(tmp_path_factory.mktemp("other") / "run2", {7: ([1, 2, 3, 4, 6, 7, 8], 0.95, 1.9)}, name="other")
    config = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**config, "mixer": {"name": "mamba2"}, "schedule": [7]}))
    return run


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_runs_of_one_teacher_share_it_and_the_frontier(full: Path, other: Path) -> None:
    runs = [read_run(full), read_run(other)]
    frame = joint_frame(runs, read_labels(runs))
    assert list(frame["name"]) == ["teacher", "demo: H1-5/10", "demo: H1-7/10", "other: H1-7/10"]
    assert list(frame["frontier"]) == [True, True, False, True], "demo's H1-7 is beaten by the other's"
    assert cautions(runs, ["demo", "other"]) == []
    lead = joint_lead(runs, ["demo", "other"], frame, 0.95)
    assert lead.startswith("Ship other: H1-7/10: it keeps 96.4%") and "1.90\u00d7" in lead
    assert table(full, other).splitlines()[-1].startswith("other: H1-7/10")


def test_runs_of_other_teachers_are_not_comparable(full: Path, other: Path, runs: Any, tmp_path: Path) -> None:
    stranger = shutil.copytree(other, tmp_path / "stranger")
    for file in stranger.rglob("step.json"):
        runs.edit(file, inputs={"teacher": "another", "measure": {"limit": 50}})
    both = [read_run(full), read_run(stranger)]
    frame = joint_frame(both, ["a", "b"])
    assert frame["name"].iloc[0] == "a: teacher" and "b: teacher" in set(frame["name"])
    assert not frame["frontier"].any()
    first, second = cautions(both, ["a", "b"])
    assert first.startswith("These runs are not comparable: they were distilled from different teachers")
    assert second == "They were measured differently: measure.limit."
    assert joint_lead(both, ["a", "b"], frame, 0.95).count("Ship ") == 2, "each beside its own"
    for file in stranger.rglob("step.json"):
        file.unlink()
    config = yaml.safe_load((stranger / "run.yaml").read_text())
    (stranger / "run.yaml").write_text(yaml.safe_dump({**config, "teacher": "my-llama"}))
    assert "it is not known which teacher b had" in cautions([read_run(full), read_run(stranger)], ["a", "b"])[0]


def test_what_differs(full: Path, other: Path) -> None:
    frame = difference_frame([read_run(full), read_run(other)], ["demo", "other"])
    assert frame.to_dict("records") == [
        {"key": "schedule", "demo": "[5, 7]", "other": "[7]"},
        {"key": "mixer.name", "demo": "mamba1", "other": "mamba2"},
    ], "not the name, and not keys that one leaves at their defaults"


def test_labels_are_unique(full: Path, runs: Any, tmp_path: Path) -> None:
    paths = [runs.build(tmp_path / parent / "run", stages={}, steps=3) for parent in ("a", "b")]
    one, two = (read_run(path) for path in paths)
    assert read_labels([one, two]) == ["a/run", "b/run"]
    assert read_labels([read_run(full)]) == ["demo"]
    with pytest.raises(UserError, match="is given twice: name each run once"):
        read_labels([one, two, one])


def test_the_page_of_two_runs(full: Path, partial: Path, other: Path) -> None:
    """One Pareto plot, what differs, every other figure side by side, and what a run in progress lacks."""
    unfinished, faster = read_run(partial), read_run(other)
    both, labels = [unfinished, faster], ["demo", "other"]
    report = joint_report(both, labels, joint_frame(both, labels))
    page = report.texts["report.html"]
    assert "demo is not finished" in page and "stage 2, H1-7/10: lacks train" in page
    assert '<h2 id="what-differs">' in page and "mixer.<wbr>name" in page
    assert page.count('class="beside"') == 10
    assert {"figures/pareto.svg", "figures/demo-loss.svg", "figures/other-loss.svg"} <= report.texts.keys()
    assert {"tables/models.parquet", "tables/differences.parquet", "figures/pareto.png"} <= report.binaries.keys()
    assert "| mixer.name | mamba1 | mamba2 |" in report.texts["report.md"]
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_models_measured_elsewhere_stand_on_the_plot(full: Path, tmp_path: Path) -> None:
    text = "name, accuracy, ratio, accuracy_stderr, tokens, licence\nOther, 0.99, 1.2, 0.01, 1e9, x\nH1-5/10,0.5,,,,\n"
    models, notes = read_external(csv(tmp_path / "models.csv", text))
    assert notes == ["models.csv: not read: licence", "models.csv: H1-5/10 has no speed: it is not on the plot"]
    run = read_run(full)
    frame = joint_frame([run], ["demo"], models)
    assert list(frame["name"])[-2:] == ["Other", "H1-5/10 (external)"]
    assert frame["frontier"].iloc[-2] and not frame["frontier"].iloc[0], "it beats the teacher"
    assert math.isnan(frame["ratio"].iloc[-1]) and set(frame["run"]) == {"demo", EXTERNAL}
    told = [artist.get_gid() for artist in pareto(frame).findobj() if artist.get_gid()]
    assert "value:Other: 99.0 ± 1.0 % accuracy, 1.20\u00d7 the teacher, 1.00B training tokens, on the frontier" in told
    assert not any("external" in text for text in told)


def test_speeds_elsewhere_in_tokens_a_second_are_set_against_the_teachers(full: Path, tmp_path: Path) -> None:
    models, _ = read_external(csv(tmp_path / "m.csv", "name,accuracy,tokens_per_second\nOther,0.9,16246\n"))
    assert joint_frame([read_run(full)], ["demo"], models)["ratio"].iloc[-1] == pytest.approx(2)


def test_the_page_with_models_measured_elsewhere(runs: Any, tmp_path: Path) -> None:
    run = read_run(runs.build(tmp_path / "run", stages={}, steps=3))
    models, notes = read_external(csv(tmp_path / "m.csv", "name,accuracy,ratio\nOther,0.9,2\nHalf,nan,1\n"))
    frame = joint_frame([run], ["demo"], models)
    report = run_report(run, frame, notes=notes)
    page = report.texts["report.html"]
    assert "Measured elsewhere" in page and "Half has no accuracy" in page and "Triangles" in page
    assert list(pd.read_csv(pd.io.common.StringIO(report.texts["tables/external.csv"]))["name"]) == ["Other", "Half"]
    assert list(pd.read_csv(pd.io.common.StringIO(report.texts["tables/stages.csv"]))["name"]) == [
        "teacher",
        "H1-5/10",
        "H1-7/10",
    ]
    assert list(stage_frame(run)) == list(pd.read_csv(pd.io.common.StringIO(report.texts["tables/stages.csv"])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,accuracy,ratio\n", r"has no column name; it has model, accuracy, ratio; it needs the columns name"),
        (
            "nam,acuracy,ratio\n",
            r"no column name \(did you mean 'nam'\?\) and no column accuracy \(did you mean 'acura",
        ),
        ("name,accuracy,ratios\n", r"no column ratio or tokens_per_second \(did you mean 'ratios'\?\)"),
        ("name,accuracy,ratio,ratio\n", "has two columns 'ratio'"),
        ("name,accuracy,ratio\na,0.5,fast\n", "line 2: ratio=fast is no number"),
        (
            "name,accuracy,ratio\na,91,1\n",
            r"line 2: accuracy=91 is no fraction in \[0, 1\]; per cent\? then write 0.91",
        ),
        ("name,accuracy,ratio\na,-1,1\n", r"accuracy=-1 is no fraction in \[0, 1\]$"),
        ("name,accuracy,ratio\na,0.5,inf\n", "ratio=inf must be a finite number above 0"),
        ("name,accuracy,ratio\na,0.5,0\n", "ratio=0 must be a finite number above 0"),
        ("name,accuracy,ratio\na,1,1\nb,1,1\na,1,1\n", "line 4: 'a' stands in line 2 already"),
        ("name,accuracy,ratio\n ,1,1\n", "line 2: the model has no name"),
        ("", "is no CSV file"),
        ("name,accuracy,ratio\n", "has a header and no model below it"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_external(csv(tmp_path / "models.csv", text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--external: there is no file .*models\.csv"):
        read_external(tmp_path / "models.csv")
    with pytest.raises(UserError, match="is no CSV file"):
        read_external(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="is no CSV file"):
        read_external(tmp_path / "binary.csv")
