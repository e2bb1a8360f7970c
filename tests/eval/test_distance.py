"""Accuracy by distance: the frame of a run, Wilson intervals, and the figure's cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval import distance, drawing
from eval.runs import Run, Stage

FAMILIES = {"add": range(1, 5), "chase": range(1, 6), "mod": range(2, 6), "recall": range(12), "sort": range(3, 7)}


def measured(values: dict[str, dict[int, tuple[float, int]]]) -> dict[str, Any]:
    rows = [
        {"task": task, "distance": d, "value": value, "stderr": 0.0, "n": n}
        for task, by in values.items()
        for d, (value, n) in by.items()
    ]
    return {"by_distance": rows}


def run_of(teacher: dict[str, Any] | None, *stages: dict[str, Any] | None) -> Run:
    records = (Stage(i, f"H1-{i}/10", {"measure": record}, ()) for i, record in enumerate(stages, start=1))
    return Run(Path("run"), {}, teacher, tuple(records))


def all_at(value: float, n: int = 9) -> dict[str, Any]:
    return measured({task: dict.fromkeys(distances, (value, n)) for task, distances in FAMILIES.items()})


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("value", "count", "low", "high"),
    [(1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.5, 4, 0.15, 0.85), (0.98, 100, 0.9300, 0.9945)],
)
def test_wilson(value: float, count: int, low: float, high: float) -> None:
    """As tables of the Wilson score interval give it; at 0 and at 1 it has a width."""
    assert distance.wilson(value, count) == pytest.approx((low, high), abs=5e-4)


def test_frame_has_a_row_for_every_model_task_and_distance() -> None:
    teacher, hybrid = measured({"chase": {1: (1.0, 4), 5: (0.5, 4)}}), measured({"chase": {1: (0.25, 4), 5: (0.0, 4)}})
    frame = distance.distance_frame(run_of(teacher, hybrid, None, {"accuracy": []}))
    assert list(frame) == distance.COLUMNS
    rows = frame[["stage", "name", "task", "distance", "value", "n"]].values.tolist()
    assert rows == [
        [0, "teacher", "chase", 1, 1.0, 4],
        [0, "teacher", "chase", 5, 0.5, 4],
        [1, "H1-1/10", "chase", 1, 0.25, 4],
        [1, "H1-1/10", "chase", 5, 0.0, 4],
    ]
    assert len(distance.distance_frame(run_of(None, None))) == 0


def test_words_say_what_a_distance_counts() -> None:
    frame = distance.distance_frame(
        run_of(measured({"recall": {0: (1.0, 1)}, "sort": {3: (1.0, 1)}, "x": {1: (1, 1)}}))
    )
    assert distance.told(frame) == (
        " The distance is the number of pairs that follow the one asked for (recall), digits (sort), distance (x)."
    )


def test_cells_show_per_cent_and_questions_and_what_stands_apart_is_bold() -> None:
    """50% of 4 questions may be the teacher's 100%; 50% of 40 may not. A hole is no figure."""
    teacher = measured({"chase": {1: (1.0, 4), 2: (1.0, 40), 3: (1.0, 8)}})
    hybrid = measured({"chase": {1: (0.5, 4), 2: (0.5, 40)}})
    figure = distance.by_distance(distance.distance_frame(run_of(teacher, hybrid)))
    found = texts(figure)
    assert found[:5] == ["teacher", "H1-1/10", "questions", "chase", "hops"]
    assert found[5:] == ["1", "100", "50", "4", "2", "100", "50", "40", "3", "100", "-", "8"]
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert bold == ["chase", "50"]
    assert figure.axes[0].texts[11].get_weight() == "bold"
    shades = [patch.get_alpha() for patch in figure.axes[0].patches if patch.get_alpha()]
    assert len(shades) == 2, "only where answers are wrong"


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
@pytest.mark.parametrize("stages", [1, 6])
def test_nothing_overlaps_or_leaves_the_figure(width: float, stages: int) -> None:
    figure = distance.by_distance(
        distance.distance_frame(run_of(all_at(1.0, 100), *[all_at(0.0, 100)] * stages)), width
    )
    lines = sum(text == "questions" for text in texts(figure))
    assert lines == 1 if width == drawing.WIDE else lines > 1
    assert texts(figure).count("0") == stages * sum(map(len, FAMILIES.values())) + 1  # and recall's distance 0
    renderer: Any = FigureCanvasAgg(figure)
    boxes = [text.get_window_extent(renderer.get_renderer()) for text in figure.axes[0].texts]
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[:i]), texts(figure)[i]


def test_many_distances_share_columns() -> None:
    """100 of them in 15 columns of 7 neighbours, each the mean over their questions."""
    teacher = measured({"long": {d: (float(d % 7 == 0), 1 + d % 7) for d in range(100)}})
    figure = distance.by_distance(distance.distance_frame(run_of(teacher)))
    found = texts(figure)[4:]
    assert found[:6] == ["0", f"{100 / 28:.0f}", "28", "7", f"{100 / 28:.0f}", "28"]
    assert len(found) == 3 * 15
