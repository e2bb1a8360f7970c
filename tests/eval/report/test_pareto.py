"""The frontier, and the sentence that says which hybrid to ship."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.frames import stage_frame
from eval.pareto import on_frontier
from eval.runs import lineage_of, read_run
from eval.summary import summary

values = st.one_of(st.none(), st.integers(0, 6))


@given(st.lists(st.tuples(values, values), max_size=12))
def test_frontier_is_what_nothing_dominates(points: list[tuple[int | None, int | None]]) -> None:
    frame = pd.DataFrame(points, columns=["ratio", "generative"], dtype=float)
    known = [p for p in points if None not in p]
    for point, frontier in zip(points, on_frontier(frame), strict=True):
        beaten = any(q != point and all(b >= a for a, b in zip(point, q, strict=True)) for q in known if point in known)
        assert frontier == (point in known and not beaten)


def test_frontier_leaves_out_a_stage_that_lost_on_both(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", {5: runs.stages[5], 7: ([2, 7], 0.9, 1.2)})
    assert list(stage_frame(read_run(run))["frontier"]) == [True, True, False]


def test_best_hybrid_is_not_chosen_by_noise_between_equally_fast_models(runs: Any, tmp_path: Path) -> None:
    """The fine-tuned model is the stage's equal in speed; the more accurate of the two counts, and its cost."""
    for level, best, minutes in ((0.98, "H1-5/10-SFT", "3.1"), (0.955, "H1-5/10", "2.3")):
        run = read_run(
            runs.tune(runs.build(tmp_path / best.replace("/", "-")), 1, level, 1.42 if level > 0.96 else 1.5)
        )
        text = summary(run, stage_frame(run))
        assert text.startswith(f"Ship {best}: it keeps")
        assert f"{minutes} minutes of training" in text


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (None, "Ship H1-5/10: it keeps 97.9% of the teacher's mean generative accuracy (95.5 ± 1.0% against 97.5%)"),
        (None, "(batch 32, 1 token in, 1,024 out), with 50% of its cache at context 2,048. It is the fastest"),
        ({5: ([1], 0.937, 1.4)}, "within one standard error of the budget"),
        ({5: ([1], 0.95, 0.9)}, "decodes 0.90\u00d7 as fast as the teacher, that is, slower"),
        ({5: ([1], 0.95, 0.9)}, "Ship none for its speed: of the hybrids that keep at least 95%"),
        (
            {5: ([1], 0.5, 1.4), 7: ([2], 0.6, 1.5)},
            "No hybrid keeps 95% of the teacher's mean generative accuracy (97.5%): ",
        ),
        ({5: ([1], 0.5, 1.4), 7: ([2], 0.6, 1.5)}, "The nearest is H1-7/10, which keeps 60.5%"),
    ],
)
def test_summary(runs: Any, tmp_path: Path, stages: dict[int, Any] | None, words: str) -> None:
    run = read_run(runs.build(tmp_path / "run", stages, steps=3))
    assert words in summary(run, stage_frame(run))


def test_a_teacher_that_answers_nothing_right_decides_nothing(runs: Any, tmp_path: Path) -> None:
    run = read_run(runs.build(tmp_path / "run", {5: ([1], 0.5, 1.4)}))
    frame = stage_frame(run)
    frame.loc[0, "generative"] = 0.0
    text = summary(run, frame)
    assert "answers no generative question right" in text and "nan" not in text and "Ship H1" not in text


def test_cost_follows_the_lineage(runs: Any, tmp_path: Path) -> None:
    """A stage from the middle of another costs that part of it; one from the teacher, nothing of the others."""
    path = runs.build(tmp_path / "run", {5: runs.stages[5], 7: ([2, 3], 0.98, 1.9)}, steps=4)
    file = path / "stages/02-H1-7/train/train.json"
    record = json.loads(file.read_text())
    for start, shares, minutes in (
        (None, [1.0, 1.0], "4.6"),
        ("H1-5/10", [1.0, 1.0], "4.6"),
        ("H1-5/10@1", [0.25, 1.0], "2.9"),
        ("teacher", [1.0], "2.3"),
        ("other/checkpoint", [1.0], "2.3"),
    ):
        file.write_text(json.dumps(record if start is None else {**record, "start": start}))
        run = read_run(path)
        assert [share for _, share in lineage_of(run.stages, run.stages[1])] == shares
        assert f"{minutes} minutes of training" in summary(run, stage_frame(run))


def test_summary_without_speed(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", {5: runs.stages[5]}, steps=3)
    runs.edit(run / "stages" / "01-H1-5" / "measure" / "measure.json", headline=None)
    assert "no speed has been measured" in summary(read_run(run), stage_frame(read_run(run)))


@pytest.mark.parametrize(("keep", "best"), [(0.5, "Ship H1-7/10"), (0.95, "Ship H1-5/10"), (0.99, "No hybrid")])
def test_the_budget_decides(runs: Any, full: Path, keep: float, best: str) -> None:
    run = read_run(full)
    text = summary(run, stage_frame(run), keep)
    assert text.startswith(best) and f"{100 * keep:g}%" in text
