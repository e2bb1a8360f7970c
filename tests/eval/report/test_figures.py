"""How figures are drawn: labels that stand free, colours, what an artist says on hover."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from eval import drawing
from eval.figures.accuracy import by_task
from eval.figures.importance import ranks
from eval.figures.pareto import pareto
from eval.figures.speed import memory, throughput
from eval.frames import importance_frame, stage_frame, task_frame
from eval.pareto import on_frontier
from eval.plots import importance_plot, plots_of
from eval.runs import read_run
from eval.speeds import memory_frame, throughput_frame
from eval.words import MINUS


def told(figure: Figure) -> list[str]:
    """What the artists of a figure say on hover."""
    found = [artist.get_gid() for artist in figure.findobj() if artist.get_gid()]
    return [text.removeprefix(drawing.TOLD) for text in found]


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
@pytest.mark.parametrize("crowd", [[0.96, 0.955, 0.93, 0.9, 0.86, 0.83], [0.98, 0.98, 0.7, 0.9, 0.6, 0.95]])
def test_labels_of_the_pareto_plot_stand_free(width: float, crowd: list[float]) -> None:
    speeds = [12_591, 13_159, 14_459, 16_652, 18_683, 21_120]
    rows = [
        {"name": f"H1-{25 + i}/50", "stage": 1 + i, "generative": y, "ratio": x / 8123}
        for i, (x, y) in enumerate(zip(speeds, crowd, strict=True))
    ]
    frame = pd.DataFrame([{"name": "teacher", "stage": 0, "generative": 0.975, "ratio": 1.0}, *rows])
    frame = frame.assign(generative_stderr=0.01, tokens=55.9e9, tokens_per_second=9.0)
    figure = pareto(frame.assign(frontier=on_frontier(frame)), width)
    boxes = text_boxes(figure)
    assert len(boxes) == 7
    axes = figure.axes[0].get_window_extent()
    for i, box in enumerate(boxes):
        assert axes.x0 <= box.x0 and box.x1 <= axes.x1 and axes.y0 <= box.y0 and box.y1 <= axes.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
def test_the_spread_of_a_speed_lies_within_the_plot_and_under_no_label(width: float) -> None:
    rows = [
        ("teacher", 0, 1.0, 1.0, None, None),
        ("H1-2/10", 1, 0.75, 0.36, 0.28, 0.52),
        ("H1-3/10", 2, 0.8, 1.03, 0.8, 1.5),
    ]
    names = ["name", "stage", "generative", "ratio", "ratio_low", "ratio_high"]
    frame = pd.DataFrame(rows, columns=names).astype({"ratio_low": float, "ratio_high": float})
    frame = frame.assign(generative_stderr=0.08, tokens=2048.0, tokens_per_second=9.0, frontier=False)
    figure = pareto(frame, width)
    place = figure.axes[0].transData.transform
    for _, _, generative, _, low, high in rows[1:]:
        (left, y), (right, _) = place([(low, 100 * generative), (high, 100 * generative)])
        axes = figure.axes[0].get_window_extent()
        assert axes.x0 <= left < right <= axes.x1
        assert not any(box.y0 < y < box.y1 and box.x0 < right and left < box.x1 for box in text_boxes(figure))


def text_boxes(figure: Figure) -> list[Any]:
    renderer: Any = FigureCanvasAgg(figure)
    notes = [note for note in figure.axes[0].texts if isinstance(note, Annotation) and note.get_text()]
    return [note.get_window_extent(renderer.get_renderer()) for note in notes]


@given(st.lists(st.floats(0, 1), max_size=9))
def test_spread_keeps_order_and_gap(wanted: list[float]) -> None:
    at = drawing.spread(sorted(wanted), 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(at))
    assert all(-1e-9 <= position <= 1 + 1e-9 for position in at)


def test_mixers_keep_their_colours() -> None:
    colours = drawing.mixer_colours(["mamba2", "mamba1", "zeta", "eta"])
    assert colours["mamba1"] == drawing.mixer_colours([])["mamba1"]
    assert len(set(colours.values())) == len(colours)
    assert drawing.model_colours(["teacher", "a", "b"])["teacher"] == drawing.INK


def test_a_fine_tuned_stage_keeps_its_colour_and_has_a_square(runs: Any, tmp_path: Path) -> None:
    names = ["teacher", "H1-5/10", "H1-5/10-SFT", "H1-7/10"]
    colours = drawing.model_colours(names)
    assert colours["H1-5/10-SFT"] == colours["H1-5/10"] != colours["H1-7/10"]
    assert colours["H1-7/10"] == drawing.model_colours(["H1-5/10", "H1-7/10"])["H1-7/10"]
    assert [drawing.marker(name) for name in names] == ["D", "o", "s", "o"]
    run = read_run(runs.tune(runs.build(tmp_path / "run"), 2, 0.98, 1.42))
    axes = pareto(stage_frame(run)).axes[0]
    assert sorted(line.get_marker() for line in axes.lines if line.get_marker() in ("o", "s", "D")) == [
        "D",
        "o",
        "o",
        "s",
    ]
    plots = {plot.name: plot for plot in plots_of(run, stage_frame(run))}
    draw = plots["tuning"].draw
    assert draw is not None
    line = next(line for line in draw(8.4).axes[0].lines if line.get_label() == "H1-7/10-SFT")
    assert line.get_color() == colours["H1-7/10"], "as in the other figures"


def test_points_say_their_values(served: Path) -> None:
    texts = told(pareto(stage_frame(read_run(served))))
    assert texts[0] == "teacher: 97.5 ± 1.0 % accuracy, 1.00\u00d7 the teacher, 8,123 tokens/s, on the frontier"
    assert texts[1].startswith(
        "H1-5/10: 95.5 ± 1.0 % accuracy, 1.43\u00d7 the teacher, 11,616 tokens/s, 0.82M training"
    )


def test_speeds_have_the_bars_of_their_quartiles(served: Path, full: Path) -> None:
    frame = stage_frame(read_run(served))
    assert frame.loc[1, "ratio_low"] == pytest.approx(0.97 * 1.43) and math.isnan(frame.loc[0, "ratio_low"])
    counts = [len(pareto(stage_frame(read_run(run))).axes[0].collections) for run in (served, full)]
    assert counts == [4 + 3, 3], "accuracy of each model, and speed of each hybrid where it is known"


def test_bars_of_every_task_and_model_with_their_errors(served: Path) -> None:
    frame = task_frame(read_run(served))
    figure = by_task(frame)
    texts = told(figure)
    assert len(texts) == len(frame) == 16
    assert "H1-5/10, add: 96.5 ± 1.7 %, 100 questions, mean of 4 samples, 3 generations cut off, 1 empty" in texts
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sorted(heights) == pytest.approx(sorted(100 * frame["value"]))
    assert len(by_task(pd.concat([frame, frame.assign(task="a" + frame["task"])]), drawing.NARROW).axes) > 1, (
        "in panels where a phone has no room"
    )


def test_ranks_fall_only_where_the_order_among_the_rest_changes() -> None:
    """Blocks 0-3; 3 is replaced first. Then 1 and 2 change places, 0 stays the most important."""
    rows = [(1, block, rank, block == 3) for block, rank in ((3, 1), (2, 2), (1, 3), (0, 4))]
    rows += [(2, block, rank, block == 1) for block, rank in ((1, 1), (2, 2), (0, 3))]
    frame = pd.DataFrame(rows, columns=["stage", "block", "rank", "replaced"])
    frame = frame.assign(name="H1", scorer="loo", score=0.1, mixer="mamba1")
    figure = ranks(frame)
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert sorted(lines) == [[1, 1], [2, 3], [3, 2]]
    inked = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_color() == drawing.INK]
    assert len(inked) == 2
    assert "H1 (loo): block 1, rank 1, score 0.1, replaced" in told(figure)


def test_ranks_of_a_run(full: Path) -> None:
    assert len(told(ranks(importance_frame(read_run(full)), drawing.NARROW))) == 10 + 5


@pytest.mark.parametrize("scorer", ["aligned", "greedy", "kl_restore", "one_to_come"])
def test_every_score_has_a_figure(full: Path, scorer: str) -> None:
    stage = read_run(full).stages[0]
    rows = [{"block": block, "score": 0.1 * block} for block in range(10)]
    scores = {"scorer": scorer, "steps": 7, "blocks": rows, "order": list(range(10))}
    plot = importance_plot(replace(stage, records={**stage.records, "score": scores}))
    assert plot.draw is not None and ("7 steps" in plot.caption) == (scorer != "one_to_come")
    figure = plot.draw(drawing.NARROW)
    assert figure.axes[0].get_ylabel() == f"score ({scorer})" and plot.title.endswith(f": {scorer}")
    assert figure.axes[0].containers[0].errorbar is None, "an error of 0 is drawn where none is known"
    assert "block 3: importance 0.3000" in told(figure)


def test_throughput_says_speed_step_and_roofline(served: Path) -> None:
    texts = told(throughput(throughput_frame(read_run(served))))
    (text,) = [text for text in texts if text.startswith("H1-7/10, batch 32, context 2,048: ")]
    assert text.endswith("\u00d7 the teacher, 72% of the roofline") and " ms a step (quartiles " in text


def test_memory_is_hollow_where_it_was_computed(served: Path) -> None:
    figure = memory(memory_frame(read_run(served)))
    dots = [line for line in figure.axes[0].lines if (line.get_gid() or "").startswith(drawing.TOLD + "teacher")]
    assert [dot.get_markerfacecolor() == drawing.PAPER for dot in dots] == [False, False, True, True]
    assert "(computed); weights 8 MiB, keys and values 640 MiB" in dots[-1].get_gid()


@pytest.mark.parametrize("text", ['a "b" <c> & d', "a 'b' </g><script>", """a 'b' "c" <d>""", "a value:b"])
def test_what_is_told_stands_in_the_svg_escaped(text: str) -> None:
    figure = Figure()
    (point,) = figure.subplots().plot([1], [1], "o")
    drawing.tell(point, text.replace(" ", "\n"))
    drawn = ElementTree.fromstring(drawing.svg_file(figure).encode())
    name = "{http://www.w3.org/2000/svg}"
    (told,) = [group for group in drawn.iter(f"{name}g") if group.get("class") == "value"]
    assert told.findtext(f"{name}title") == text
    assert not list(drawn.iter(f"{name}script"))


def test_candidates_that_halving_dropped_and_other_scores_are_told(full: Path, tmp_path: Path) -> None:
    run = shutil.copytree(full, tmp_path / "run")
    file = run / "stages/02-H1-7/score/scores.json"
    scores = json.loads(file.read_text())
    for place, row in enumerate(scores["blocks"]):
        row |= {"steps": scores["steps"] // (4 if place else 1), "loss_25": row["loss_end"]}
    scores["halving"] = {"rungs": [25, 50, 100], "steps_run": 1, "steps_full": 2, "saved": 0.5}
    scores["compared"] = [{"scorer": "loo", "spearman": -0.4, "same_choice": 1, "order": [], "blocks": []}]
    file.write_text(json.dumps(scores))
    (stage,) = [stage for stage in read_run(run).stages if stage.index == 2]
    plot = importance_plot(stage)
    assert "it saved 50% of the steps" in plot.caption
    assert f"Rank correlation of other scores with this one: loo {MINUS}0.40." in plot.caption
    assert plot.draw is not None
    figure = plot.draw(drawing.WIDE)
    dashed = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]
    assert len(dashed) >= len(scores["blocks"]) - 1
    assert sum(f"after {scores['steps'] // 4} steps" in text for text in told(figure)) == len(scores["blocks"]) - 1
