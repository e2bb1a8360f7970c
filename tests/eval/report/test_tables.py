"""Tables as text: for the terminal, the page, the model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.drawing import count
from eval.frames import stage_frame
from eval.markdown import pipes
from eval.page import table as html_table
from eval.provenance import cost_frame
from eval.report import table
from eval.runs import read_run
from eval.speeds import protocol_frame
from eval.tables import TERMINAL, aligned, cost_rows, protocol_rows, table_rows
from eval.words import NOT_MEASURED, duration


def test_table_is_one_block_where_it_fits(runs: Any, partial: Path, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", steps=200)
    for file in run.rglob("measure.json"):
        runs.edit(file, accuracy=json.loads(file.read_text())["accuracy"][:2])
    lines = table(run).splitlines()
    assert max(map(len, lines)) <= TERMINAL
    rule = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    assert [line.split()[0] for line in lines[rule + 1 :]] == ["teacher", "H1-5/10", "H1-7/10"]
    assert len({len(line) for line in lines[rule:]}) == 1
    assert lines[rule + 2].split()[-7:] == ["11,616", "1.43\u00d7", "160.0", "+", "1.4", "0.82M", "2.3"]
    assert lines[rule + 2].split()[1] == "96.5\u00b11.7"
    assert " 0 " not in table(partial) and NOT_MEASURED in table(partial)


FAMILIES = dict.fromkeys(["add", "mod", "chase", "recall", "sort"], "generative")


def test_the_demos_table_is_cut_in_two(runs: Any, tmp_path: Path) -> None:
    """The tasks above; below, the mean beside what it costs: each within the terminal."""
    run = runs.with_tasks(runs.build(tmp_path / "run", steps=3), {**FAMILIES, "embedded_choice": "multiple_choice"})
    text = table(run)
    assert max(map(len, text.splitlines())) <= TERMINAL == 100
    accuracy, cost = text.split("\n\n")
    assert accuracy.splitlines()[-1].split() == ["H1-7/10", *["100.0\u00b10.0"] * 6]
    last = "H1-7/10 100.0\u00b10.0 13,890 1.71\u00d7 96.0 + 1.9 24.6K 2.3"
    assert cost.splitlines()[-1].split() == last.split()


def test_the_cache_is_that_of_the_largest_batch_and_longest_context(runs: Any, full: Path, tmp_path: Path) -> None:
    """Keys and values apart from states; the teacher's as the stages found it where it is not measured alone."""
    frame = stage_frame(read_run(full))
    assert list(frame["kv_bytes"]) == [32 * left * 2048 * 512 for left in (10, 5, 3)]
    assert list(frame["state_bytes"]) == [32 * replaced * 9000 for replaced in (0, 5, 7)]
    run = shutil.copytree(full, tmp_path / "run")
    shutil.rmtree(run / "teacher")
    assert stage_frame(read_run(run)).loc[0, "kv_bytes"] == frame.loc[0, "kv_bytes"]
    file = run / "stages" / "01-H1-5" / "measure" / "measure.json"
    rows = json.loads(file.read_text())["throughput"]
    runs.edit(file, throughput=[{k: v for k, v in row.items() if k not in ("kv_bytes", "state_bytes")} for row in rows])
    assert table_rows(stage_frame(read_run(run)), runs.tasks)[2][-3] == NOT_MEASURED, (
        "a record of before they were told"
    )


def test_a_mean_of_one_task_has_no_column(runs: Any, full: Path, tmp_path: Path) -> None:
    header = table_rows(stage_frame(read_run(full)), runs.tasks)[0]
    assert "mean generative" in header and "mean choice" not in header
    tasks = {"a": "generative", "b": "multiple_choice", "c": "multiple_choice"}
    run = read_run(runs.with_tasks(runs.build(tmp_path / "run", steps=3), tasks))
    header = table_rows(stage_frame(run), tasks)[0]
    assert "mean choice" in header and "mean generative" not in header


def test_headers_break_at_words() -> None:
    text = aligned([["model", "embedded_choice", "vs teacher"], ["teacher", "97.0", "1.00x"]])
    assert text.splitlines() == [
        "         embedded_       vs",
        "model       choice  teacher",
        "-------  ---------  -------",
        "teacher       97.0    1.00x",
    ]


def test_standard_errors_stand_on_a_line_of_their_own() -> None:
    html = html_table([["model", "a_b"], ["x", "97.0\u00b11.2"], ["y", NOT_MEASURED]], [True, False], "it's")
    assert "<td>97.0<small>\u00b1 1.2</small></td>" in html and "a_<wbr>b" in html
    assert f'<td class="missing">{NOT_MEASURED}</td>' in html
    assert html.count("on the Pareto frontier") == 1


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(640, "640"), (12_345, "12.3K"), (819_200, "0.82M"), (1_638_400, "1.64M"), (55.9e9, "55.9B"), (0, "0")],
)
def test_count(tokens: float, text: str) -> None:
    assert count(tokens) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (119, "119.0 s"), (720, "12.0 min"), (9000, "2.5 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_for_each_model_and_protocol(served: Path, full: Path) -> None:
    header, *rows = protocol_rows(protocol_frame(read_run(served)))
    assert header == ["model", "protocol", "batch", "tokens/s", "vs teacher", "predicted", "memory", "of roofline"]
    teacher = next(row for row in rows if row[:2] == ["teacher", "equal memory"])
    assert teacher[4:] == ["\u2013", "\u2013", "1.0 GiB", "71%"]
    hybrid = [row for row in rows if row[0] == "H1-5/10"]
    assert {"1.43\u00d7", "1.57\u00d7"} <= {cell for row in hybrid for cell in row}, "measured and predicted"
    assert [row[1:3] for row in hybrid][:2] == [["equal batch", "1"], ["equal batch", "32"]]
    assert "memory" not in protocol_rows(protocol_frame(read_run(full)))[0]


def test_the_cost_of_each_model_and_of_all(full: Path) -> None:
    rows = cost_rows(cost_frame(read_run(full)))
    assert rows[0] == ["model", "tokens", "score", "place", "swap", "train", "measure", "in all", "device"]
    assert rows[2] == [
        "H1-5/10", "0.82M", "7.0 s", "14.0 s", "21.0 s", "2.3 min", "35.0 s", "3.6 min", "a CPU, 2 cores",
    ]  # fmt: skip
    assert rows[-1][:2] == ["all", "1.64M"]


def test_markdown_cells_cannot_break_the_table() -> None:
    assert pipes([["a|b", "c"], ["x\ny", "1"]]).splitlines() == ["| a\\|b | c |", "| --- | ---: |", "| x y | 1 |"]
