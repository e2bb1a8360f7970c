"""The report that is written: page, figures, tables, Markdown."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from distill.errors import UserError
from eval import drawing
from eval.frames import loss_frame, stage_frame
from eval.plots import plots_of
from eval.report import Report, write_report
from eval.runs import read_run, tasks_of
from eval.speeds import throughput_frame
from eval.summary import missing
from eval.tables import table_rows
from eval.words import NOT_MEASURED

SECTIONS = ["Accuracy against throughput", "Stages", "Accuracy by task", "Accuracy by distance", "Placement"]
SECTIONS += ["Importance", "Training", "Throughput against context", "Memory against sequence length", "Cost"]
FIGURES = ["pareto", "tasks", "distance", "placement", "ranks", "importance-01", "importance-02", "loss"]
FIGURES += ["throughput", "memory", "cost"]
TABLES = ["stages", "tasks", "by_distance", "placement", "importance", "training", "throughput", "protocols"]
TABLES += ["memory", "cost", "provenance"]


@pytest.fixture(scope="module")
def reported(full: Path) -> Path:
    """A finished run with its report."""
    write_report(full)
    return full


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def names(folder: Path, ending: str) -> list[str]:
    return sorted(file.stem for file in folder.glob(f"*{ending}"))


def test_every_figure_is_there(runs: Any, reported: Path) -> None:
    folder = reported / "report" / "figures"
    assert names(folder, ".png") == names(folder, ".svg") == sorted(FIGURES)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))
    assert all("<title>" in (folder / f"{name}.svg").read_text() for name in FIGURES)
    assert runs.page(reported).count("<svg") == 2 * len(FIGURES)
    assert re.findall("<h2.*?>(.*?)</h2>", runs.page(reported)) == [*SECTIONS, "Provenance"]
    assert NOT_MEASURED not in runs.page(reported) and "Missing" not in runs.page(reported)


def test_what_newer_records_tell_is_shown(runs: Any, served: Path) -> None:
    write_report(served)
    assert {"prefill", "tuning"} <= set(names(served / "report/figures", ".png"))
    for text in (
        "Throughput by protocol", "equal memory", "Generations cut off by the length limit: teacher add 3",
        "The roofline is that of a CPU: 21.0 GB/s", "H1-5/10-SFT",
        "faster than with attention: with mamba1 from context 1,200 at batch 1",
    ):  # fmt: skip
        assert text in runs.page(served)


def test_every_table_is_there_in_both_forms(reported: Path) -> None:
    folder = reported / "report" / "tables"
    assert names(folder, ".csv") == names(folder, ".parquet") == sorted(TABLES)
    for name in TABLES:
        text, exact = pd.read_csv(folder / f"{name}.csv"), pd.read_parquet(folder / f"{name}.parquet")
        assert list(text) == list(exact) and len(text) == len(exact) > 0


def test_markdown_for_a_model_card(reported: Path) -> None:
    text = (reported / "report" / "report.md").read_text()
    assert text.startswith("# demo\n\nShip H1-5/10: it keeps")
    assert all((reported / "report" / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", text))
    assert "| model | add | recall |" in text and "| H1-7/10 | 86.0±1.7 |" in text
    assert "```\ndistill run demo\n```" in text


def test_what_an_earlier_report_left_is_taken_away(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", stages={}, steps=3)
    (run / "report" / "figures").mkdir(parents=True)
    (run / "report" / "figures" / "importance-07.png").write_text("old")
    (run / "report" / "figures" / "notes.txt").write_text("mine")
    write_report(run)
    assert not (run / "report/figures/importance-07.png").exists() and (run / "report/figures/notes.txt").exists()


def test_nothing_is_taken_from_a_folder_of_the_users(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "paper" / "figures").mkdir(parents=True)
    (tmp_path / "paper" / "figures" / "mine.png").write_text("mine")
    Report({"figures/pareto.svg": "<svg/>", "report.html": ""}).write(tmp_path / "paper", clear=False)
    assert (tmp_path / "paper/figures/mine.png").exists() and (tmp_path / "paper/figures/pareto.svg").exists()


def test_page_needs_nothing_else(runs: Any, reported: Path) -> None:
    tags = Tags(runs.page(reported)).found
    links = [value or "" for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in tags}
    assert [attrs for tag, attrs in tags if tag == "script"] == [{"type": "module"}], "one, inline"
    assert not re.search(r"https?://(?!www\.w3\.org)", runs.page(reported))
    assert "@import" not in runs.page(reported) and not re.search(r"url\((?!#)", runs.page(reported))


def test_ids_are_unique_and_links_meet_them(runs: Any, reported: Path) -> None:
    tags = Tags(runs.page(reported)).found
    ids = Counter(attrs["id"] for _, attrs in tags if "id" in attrs)
    assert ids.most_common(1)[0][1] == 1
    assert {attrs["xlink:href"] for _, attrs in tags if "xlink:href" in attrs} <= {f"#{name}" for name in ids}


def test_ink_follows_the_scheme(runs: Any, reported: Path) -> None:
    drawn = "".join(re.findall("<svg.*?</svg>", runs.page(reported), flags=re.DOTALL))
    assert "var(--ink, #1f2431)" in drawn
    assert not re.search(r"(?<!, )#(1f2431|5f6b7c|dfe3ea|fefefe)", drawn)


def test_the_table_says_at_which_shape_the_cache_was_taken(runs: Any, reported: Path) -> None:
    assert "in the cache of the whole batch (batch 32, context 2,048)" in runs.page(reported)


def test_same_records_same_page(runs: Any, reported: Path) -> None:
    run = read_run(reported)
    plots = [plot for plot in plots_of(run, stage_frame(run)) if plot.name in ("pareto", "memory") and plot.draw]
    assert len(plots) == 2
    for plot in plots:
        assert plot.draw is not None
        assert drawing.inline(drawing.svg_file(plot.draw(drawing.WIDE)), f"{plot.name}-wide") in runs.page(reported)


def test_csv(runs: Any, reported: Path) -> None:
    frame = pd.read_csv(reported / "report" / "tables" / "stages.csv")
    tasks = [column for task in runs.tasks for column in (task, f"{task}_stderr")]
    means = [column for kind in ("generative", "multiple_choice") for column in (kind, f"{kind}_stderr")]
    speed = ["tokens_per_second", "teacher_tokens_per_second", "ratio", "tokens", "minutes", "ratio_low", "ratio_high"]
    cache = ["kv_bytes", "state_bytes", "cache_batch", "cache_context"]
    first = ["stage", "name", "replaced", "num_blocks", "parameters"]
    assert list(frame) == [*first, *tasks, *means, *speed, *cache, "backend", "frontier"]
    assert list(frame["name"]) == ["teacher", "H1-5/10", "H1-7/10"]
    pd.testing.assert_frame_equal(frame, stage_frame(read_run(reported)), check_dtype=False)


def test_values_from_files_are_escaped(runs: Any, tmp_path: Path) -> None:
    evil = '<script>alert("$x$")</script>'
    run = runs.build(tmp_path / "run", steps=3)
    (run / "run.yaml").write_text(yaml.safe_dump({"name": evil, "schedule": [5, 7], "teacher": evil}))
    stage = run / "stages" / "01-H1-5"
    accuracy = [{"task": evil, "kind": "generative", "metric": evil, "value": 0.5, "stderr": 0.1, "n": 10}]
    runs.edit(stage / "measure" / "measure.json", name=evil, accuracy=accuracy)
    runs.edit(stage / "place" / "placement.json", name=evil, mixers=[evil] * 10)
    runs.edit(stage / "score" / "scores.json", metric=evil)
    runs.edit(run / "stages" / "02-H1-7" / "score" / "scores.json", trainable=evil, scorer=evil)
    write_report(run)
    assert [tag for tag, _ in Tags(runs.page(run)).found].count("script") == 1, "ours"
    assert runs.page(run).count("<script") == 1 and runs.page(run).count("&lt;script&gt;") > 5


def test_a_moved_run_gives_the_same_report(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.build(tmp_path / "run", stages={}, steps=3)
    write_report(run)
    before = runs.page(run)
    moved = shutil.copytree(run, tmp_path / "elsewhere" / "moved")
    shutil.rmtree(moved / "report")
    assert write_report(moved) == moved / "report" / "report.html"
    assert runs.page(moved) == before
    (moved / "run.yaml").unlink()
    monkeypatch.chdir(moved)
    write_report(Path("."))
    assert "<h1>moved</h1>" in runs.page(moved)


def test_a_report_that_cannot_be_written(runs: Any, tmp_path: Path) -> None:
    run = runs.build(tmp_path / "run", stages={})
    (run / "report").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .*report"):
        write_report(run)


def test_a_report_leaves_no_temporary_files(reported: Path) -> None:
    assert {file.name for file in (reported / "report").iterdir()} == {"report.html", "report.md", "figures", "tables"}
    assert not [file for file in (reported / "report").rglob("*") if file.name.startswith(".")]


def test_a_fine_tuned_stage_follows_its_stage(runs: Any, tmp_path: Path) -> None:
    run = read_run(runs.tune(runs.build(tmp_path / "run"), 1, 0.98, 1.42))
    frame = stage_frame(run)
    assert list(frame["name"]) == ["teacher", "H1-5/10", "H1-5/10-SFT", "H1-7/10"]
    assert list(frame["stage"]) == [0, 1, 1, 2]
    assert frame["tokens"].iloc[2] == 4096 * 200 + 204_800
    assert [row[0] for row in table_rows(frame, tasks_of(run))][3] == "H1-5/10-SFT"
    assert set(throughput_frame(run)["model"]) == set(frame["name"])
    tuned = loss_frame(run, tuned=True)
    assert set(tuned["model"]) == {"H1-5/10-SFT"}
    assert tuned["tokens"].iloc[0] == 4096 * 200 and tuned["tokens"].iloc[-1] == 4096 * 200 + 204_800
    assert set(loss_frame(run)["model"]) == {"H1-5/10", "H1-7/10"}, "the losses are of two kinds"
    assert missing(run) == []
    plots = {plot.name: plot for plot in plots_of(run, frame)}
    assert "merged with alpha = 0.25, held-out loss 0.3450" in plots["tuning"].caption
    assert "Squares" in plots["pareto"].caption


def test_without_fine_tuning_nothing_is_said_of_it(reported: Path) -> None:
    run = read_run(reported)
    assert run.models == list(run.stages)
    text = (reported / "report/report.html").read_text()
    assert "Fine-tuning" not in text and "Squares" not in text


def test_what_another_program_ran_is_said_to_be(full: Path, tmp_path: Path) -> None:
    """A GGUF file's ratio is to a teacher that PyTorch ran."""
    run = shutil.copytree(full, tmp_path / "run")
    measure = json.loads((run / "stages/01-H1-5/measure/measure.json").read_text())
    folder = run / "gguf/01-H1-5-Q8_0/measure"
    folder.mkdir(parents=True)
    (folder / "measure.json").write_text(json.dumps({**measure, "name": "H1-5/10-Q8_0", "backend": "llama.cpp"}))
    said = "H1-5/10-Q8_0 ran in llama.cpp and the teacher in PyTorch"
    captions = [plot.caption for plot in plots_of(read_run(run), stage_frame(read_run(run)))]
    assert said in captions[0] and "Squares named after a type are GGUF files" in captions[0]
    write_report(run)
    assert said in (run / "report/report.md").read_text()
    assert "llama.cpp" not in plots_of(read_run(full), stage_frame(read_run(full)))[0].caption
