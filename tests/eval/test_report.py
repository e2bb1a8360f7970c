"""The report of a run: frontier, table, figures, page; finished, unfinished and hostile run folders."""

import json
import math
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from distill.errors import UserError
from eval import drawing, figures
from eval.page import NOT_MEASURED, aligned
from eval.page import table as html_table
from eval.pareto import lineage_of, loss_frame, on_frontier, read_run, stage_frame, tasks_of, throughput_frame
from eval.report import TERMINAL, missing, plots_of, summary, table, table_rows, write_report

BLOCKS = 10
TASKS = {"add": "generative", "recall": "generative", "chase": "generative", "embedded_choice": "multiple_choice"}
STAGES = {5: ([1, 3, 4, 6, 8], 0.965, 1.43), 7: ([2, 7], 0.86, 1.71)}


def write_json(file: Path, record: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def measure(name: str, replaced: int, tokens: int, level: float, ratio: float) -> dict[str, Any]:
    """A plausible measure.json: a model at `level` accuracy and `ratio` times the teacher's speed."""
    accuracy = [
        {
            "task": task,
            "kind": kind,
            "metric": "exact_match" if kind == "generative" else "acc",
            "value": level - 0.01 * i,
            "stderr": math.sqrt(0.03 / (100 if kind == "generative" else 600)),
            "n": 100 if kind == "generative" else 600,
        }
        for i, (task, kind) in enumerate(TASKS.items())
    ]
    throughput = []
    for batch in (1, 32):
        for context in (64, 128, 256, 512, 1024, 2048):
            teacher = (1.9e-3 + 4e-8 * context * batch) * (1 + batch / 40)
            mine = teacher * (1 - 0.06 * replaced * min(1, context * batch / 4000))
            timed = {"teacher": (teacher, BLOCKS), name: (mine, BLOCKS - replaced)}
            for model, (seconds, left) in timed.items():
                row = {"model": model, "batch": batch, "context": context, "step_seconds": seconds}
                row |= {"step_seconds_low": 0.96 * seconds, "step_seconds_high": 1.07 * seconds}
                held = {"kv_bytes": batch * left * context * 512, "state_bytes": batch * (BLOCKS - left) * 9000}
                row |= {"tokens_per_second": batch / seconds, "cache_bytes": sum(held.values())}
                throughput.append(row | held)
    by_distance = [
        {"task": task, "distance": distance, "value": level ** (1 + distance), "stderr": 0.01, "n": 40 - 8 * distance}
        for task, distances in {"recall": range(5), "chase": range(1, 4)}.items()
        for distance in distances
    ]
    speed = 8123.0
    return {
        "name": name,
        "replaced": replaced,
        "num_blocks": BLOCKS,
        "tokens": tokens,
        "minutes": 2.31,
        "parameters": 2_100_000 + 20_000 * replaced,
        "accuracy": accuracy,
        "by_distance": by_distance,
        "throughput": throughput,
        "headline": {
            "batch": 32,
            "output_tokens": 1024,
            "teacher_tokens_per_second": speed,
            "tokens_per_second": speed * ratio,
            "ratio": ratio,
        },
    }


def build_run(path: Path, stages: dict[int, Any] | None = None, steps: int = 200) -> Path:
    """A synthetic run folder of a 10-block teacher with schedule 5, 7, of which `stages` are done."""
    rng = random.Random(7)
    path.mkdir(parents=True)
    train = {"loss": "reverse_kl", "temperature": 1.0, "steps": steps}
    config = {"name": "demo", "teacher": "embedded", "schedule": [5, 7], "mixer": {"name": "mamba1"}, "train": train}
    (path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(path / "teacher" / "measure.json", measure("teacher", 0, 0, 0.985, 1.0))
    mixers = ["attention"] * BLOCKS
    for index, (replaced, (added, level, ratio)) in enumerate((STAGES if stages is None else stages).items(), 1):
        stage, name = path / "stages" / f"{index:02d}-H1-{replaced}", f"H1-{replaced}/{BLOCKS}"
        left = [block for block, mixer in enumerate(mixers) if mixer == "attention"]
        if index == 1:
            cost = {block: 0.003 * rng.random() + (0.02 if block not in added else 0) * (block + 1) for block in left}
            blocks = [{"block": b, "score": cost[b] + 0.3 * (b == 0), "stderr": 0.006} for b in left]
            scores = {"scorer": "loo", "metric": "acc", "baseline": 0.97, "baseline_stderr": 0.007, "blocks": blocks}
        else:
            blocks = [
                {"block": b, "score": end, "loss_start": rng.uniform(0.08, 0.16), "loss_end": end}
                for b in left
                for end in [0.021 + 0.001 * rng.random() + (0 if b in added else 0.012)]
            ]
            scores = {"scorer": "mmr", "steps": 25, "trainable": "all", "blocks": blocks}
        write_json(stage / "score" / "scores.json", scores | {"seconds": 12.5})
        for block in added:
            mixers[block] = "mamba1"
        write_json(stage / "place" / "placement.json", {"mixers": mixers, "added": added, "name": name})
        losses = [0.02 + 0.3 * index * math.exp(-step / 40) * rng.uniform(0.7, 1.3) for step in range(1, steps + 1)]
        log: list[dict[str, Any]] = []
        for step, loss in enumerate(losses, start=1):
            log.append({"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 4096 * step})
            if step % 50 == 0:
                log.append({"step": step, "eval_loss": 0.02 + 0.3 * index * math.exp(-step / 40)})
        (stage / "train").mkdir(parents=True)
        (stage / "train" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        train = {"steps": steps, "tokens": 4096 * steps, "minutes": 2.31, "eval_loss_start": 0.35 * index}
        write_json(stage / "train" / "train.json", train)
        record = measure(name, replaced, 4096 * steps * index, level, ratio)
        write_json(stage / "measure" / "measure.json", record)
    return path


def tune(
    run: Path, index: int, level: float, ratio: float, *, steps: tuple[str, ...] = ("train", "merge", "measure")
) -> Path:
    """Adds what ``distill sft`` writes for a stage of `run`, up to the last of `steps`."""
    stage = sorted((run / "stages").iterdir())[index - 1]
    replaced, folder = int(stage.name.split("-")[-1]), run / "posttrain" / f"{stage.name}-SFT"
    before = json.loads((stage / "measure" / "measure.json").read_text())["tokens"]
    log = [{"step": step, "loss": 0.4 - step / 1000, "tokens": 2048 * step} for step in range(1, 101)]
    log += [{"step": 0, "eval_loss": 0.41}, {"step": 100, "eval_loss": 0.31}]
    train = "train" if "train" in steps else "train.partial"
    (folder / train).mkdir(parents=True)
    (folder / train / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    record = measure(f"H1-{replaced}/{BLOCKS}-SFT", replaced, before + 204_800, level, ratio) | {"minutes": 0.75}
    records = {
        "train": {"steps": 100, "tokens": 204_800, "minutes": 0.75, "eval_loss_start": 0.41, "eval_loss_end": 0.31},
        "merge": {"alpha": 0.25, "eval_loss": 0.345},
        "measure": record,
    }
    for step in steps:
        write_json(folder / step / f"{step}.json", records[step])
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build_run(tmp_path_factory.mktemp("full") / "run")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage was killed in training, in the middle of a log line."""
    run = build_run(tmp_path_factory.mktemp("partial") / "run")
    stage = run / "stages" / "02-H1-7"
    shutil.rmtree(stage / "measure")
    (stage / "train" / "train.json").unlink()
    (stage / "train").rename(stage / "train.partial")
    log = stage / "train.partial" / "log.jsonl"
    log.write_text(log.read_text()[:5000])
    write_report(run)
    return run


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def page(run: Path) -> str:
    return (run / "report" / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# ---- the frontier


values = st.one_of(st.none(), st.integers(0, 6))


@given(st.lists(st.tuples(values, values), max_size=12))
def test_frontier_is_what_nothing_dominates(points: list[tuple[int | None, int | None]]) -> None:
    frame = pd.DataFrame(points, columns=["ratio", "generative"], dtype=float)
    known = [p for p in points if None not in p]
    for point, frontier in zip(points, on_frontier(frame), strict=True):
        beaten = any(q != point and all(b >= a for a, b in zip(point, q, strict=True)) for q in known if point in known)
        assert frontier == (point in known and not beaten)


def test_frontier_leaves_out_a_stage_that_lost_on_both(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", {5: STAGES[5], 7: ([2, 7], 0.9, 1.2)})
    assert list(stage_frame(read_run(run))["frontier"]) == [True, True, False]


# ---- the frames


def test_stage_frame_takes_means_over_a_kind(full: Path) -> None:
    teacher = stage_frame(read_run(full)).iloc[0]
    assert teacher["generative"] == pytest.approx((0.985 + 0.975 + 0.965) / 3)
    assert teacher["generative_stderr"] == pytest.approx(math.sqrt(3 * 0.03 / 100) / 3)
    assert teacher["multiple_choice"] == pytest.approx(0.955)


def test_a_mean_over_fewer_tasks_is_no_mean(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    file = run / "stages" / "01-H1-5" / "measure" / "measure.json"
    edit(file, accuracy=json.loads(file.read_text())["accuracy"][1:])
    frame = stage_frame(read_run(run))
    assert math.isnan(frame.loc[1, "add"]) and math.isnan(frame.loc[1, "generative"])
    assert frame.loc[1, "recall"] > 0 and frame.loc[2, "generative"] > 0


def test_teacher_speed_comes_from_the_stages_if_need_be(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    edit(run / "teacher" / "measure.json", headline=None)
    assert stage_frame(read_run(run)).loc[0, "tokens_per_second"] == 8123


def test_losses_lie_along_the_lineage(full: Path) -> None:
    frame = loss_frame(read_run(full))
    second = frame[frame["model"] == "H1-7/10"]
    assert (second["step"].iloc[0], second["tokens"].iloc[0]) == (0, 4096 * 200)
    assert second["tokens"].iloc[-1] == 2 * 4096 * 200
    assert frame["tokens"].is_monotonic_increasing
    assert second["eval_loss"].iloc[0] == pytest.approx(0.7)


def test_a_branch_starts_where_it_branched(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    edit(run / "stages" / "02-H1-7" / "measure" / "measure.json", tokens=4096 * 300)
    frame = loss_frame(read_run(run))
    assert frame[frame["model"] == "H1-7/10"]["tokens"].iloc[0] == 4096 * 100


def test_steps_logged_twice_count_once(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", {5: STAGES[5]}, steps=20)
    log = run / "stages" / "01-H1-5" / "train" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 20, "loss": 9.0, "tokens": 81920}) + "\n")
    frame = loss_frame(read_run(run))
    assert list(frame["step"]) == list(range(21)) and frame["loss"].iloc[-1] == 9.0


def test_throughput_has_one_teacher(full: Path) -> None:
    frame = throughput_frame(read_run(full))
    assert set(frame["model"]) == {"teacher", "H1-5/10", "H1-7/10"}
    assert not frame.duplicated(["model", "batch", "context"]).any()


# ---- the page, its figures and the CSV

SECTIONS = ["Accuracy against throughput", "Stages", "Accuracy by distance", "Placement", "Importance", "Training"]
SECTIONS += ["Decode time", "Cache"]
FIGURES = ["pareto", "distance", "placement", "importance-01", "importance-02", "loss", "decode", "cache"]


def test_every_figure_is_there(full: Path) -> None:
    assert sorted(file.stem for file in (full / "report").glob("*.png")) == sorted(FIGURES)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (full / "report").glob("*.png"))
    assert page(full).count("<svg") == 2 * len(FIGURES)
    assert re.findall("<h2>(.*?)</h2>", page(full)) == [*SECTIONS, "Config"]
    assert page(full).count("From the step") == len(FIGURES) + 1
    assert NOT_MEASURED not in page(full) and "Missing" not in page(full)


def test_page_needs_nothing_else(full: Path) -> None:
    tags = Tags(page(full)).found
    links = [value or "" for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert "@import" not in page(full) and not re.search(r"url\((?!#)", page(full))


def test_ids_are_unique_and_links_meet_them(full: Path) -> None:
    tags = Tags(page(full)).found
    ids = Counter(attrs["id"] for _, attrs in tags if "id" in attrs)
    assert ids.most_common(1)[0][1] == 1
    assert {attrs["xlink:href"] for _, attrs in tags if "xlink:href" in attrs} <= {f"#{name}" for name in ids}


def test_ink_follows_the_scheme(full: Path) -> None:
    drawn = "".join(re.findall("<svg.*?</svg>", page(full), flags=re.DOTALL))
    assert "var(--ink, #1f2431)" in drawn
    assert not re.search(r"(?<!, )#(1f2431|5f6b7c|dfe3ea|fefefe)", drawn)


def test_same_records_same_page(full: Path) -> None:
    run = read_run(full)
    plots = [plot for plot in plots_of(run, stage_frame(run)) if plot.name in ("pareto", "cache") and plot.draw]
    assert len(plots) == 2
    for plot in plots:
        assert plot.draw is not None
        assert drawing.svg(plot.draw(drawing.WIDE), f"{plot.name}-wide") in page(full)


def test_csv(full: Path) -> None:
    frame = pd.read_csv(full / "report" / "stages.csv")
    tasks = [column for task in TASKS for column in (task, f"{task}_stderr")]
    means = [column for kind in ("generative", "multiple_choice") for column in (kind, f"{kind}_stderr")]
    speed = ["tokens_per_second", "teacher_tokens_per_second", "ratio", "tokens", "minutes"]
    cache = ["kv_bytes", "state_bytes", "cache_batch", "cache_context"]
    first = ["stage", "name", "replaced", "num_blocks", "parameters"]
    assert list(frame) == [*first, *tasks, *means, *speed, *cache, "frontier"]
    assert list(frame["name"]) == ["teacher", "H1-5/10", "H1-7/10"]
    pd.testing.assert_frame_equal(frame, stage_frame(read_run(full)), check_dtype=False)


def test_values_from_files_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("$x$")</script>'
    run = build_run(tmp_path / "run", steps=3)
    (run / "run.yaml").write_text(yaml.safe_dump({"name": evil, "schedule": [5, 7], "teacher": evil}))
    stage = run / "stages" / "01-H1-5"
    accuracy = [{"task": evil, "kind": "generative", "metric": evil, "value": 0.5, "stderr": 0.1, "n": 10}]
    edit(stage / "measure" / "measure.json", name=evil, accuracy=accuracy)
    edit(stage / "place" / "placement.json", name=evil, mixers=[evil] * 10)
    edit(stage / "score" / "scores.json", metric=evil)
    edit(run / "stages" / "02-H1-7" / "score" / "scores.json", trainable=evil, scorer=evil)
    write_report(run)
    assert "script" not in {tag for tag, _ in Tags(page(run)).found}
    assert "<script" not in page(run) and page(run).count("&lt;script&gt;") > 5


# ---- unfinished runs


def test_teacher_only(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", stages={})
    write_report(run)
    assert {file.stem for file in (run / "report").glob("*.png")} == {"pareto", "distance", "decode", "cache"}
    assert "Only the teacher has been measured: 97.5% mean generative accuracy at 8,123 tokens/s" in page(run)
    assert missing(read_run(run)) == ["stage 1, H1-5/10: not started", "stage 2, H1-7/10: not started"]


def test_a_stage_cut_short(partial: Path) -> None:
    (line,) = missing(read_run(partial))
    assert re.fullmatch(r"stage 2, H1-7/10: lacks train \(reached step \d+ of 200\), measure", line)
    assert line in page(partial)
    *_, row = re.findall("<tr>.*?</tr>", page(partial))
    cells = re.findall("<td.*?>(.*?)</td>", row)
    assert cells == [NOT_MEASURED] * (len(TASKS) + 6)
    partial_log = loss_frame(read_run(partial))
    assert set(partial_log["model"]) == {"H1-5/10", "H1-7/10"}


@pytest.mark.parametrize("step", ["score", "place", "train", "measure"])
def test_any_step_may_be_missing(tmp_path: Path, step: str) -> None:
    run = build_run(tmp_path / "run", steps=5)
    shutil.rmtree(run / "stages" / "01-H1-5" / step)
    shutil.rmtree(run / "teacher")
    records = read_run(run)
    drawn = [plot.name for plot in plots_of(records, stage_frame(records)) if plot.draw and plot.draw(drawing.WIDE)]
    assert set(FIGURES) - set(drawn) <= {"importance-01", "pareto", "distance"}
    lines = missing(records)
    assert lines[0].startswith("the teacher") and lines[1].endswith(f"lacks {step}")
    assert table(run)


def test_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: empty\nschedule: [5, 7]\n")
    write_report(tmp_path)
    assert page(tmp_path).count(f'<p class="missing">{NOT_MEASURED}</p>') == 7
    assert not list((tmp_path / "report").glob("*.png"))


def test_steps_planned_by_stage(partial: Path, tmp_path: Path) -> None:
    run = shutil.copytree(partial, tmp_path / "run")
    (run / "run.yaml").write_text("schedule: [5, 7]\ntrain: {steps: 1, steps_by_stage: [200, 4000]}\n")
    assert "of 4,000)" in missing(read_run(run))[0]


def test_a_moved_run_gives_the_same_report(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page(full)
    moved = shutil.copytree(full, tmp_path / "elsewhere" / "moved")
    shutil.rmtree(moved / "report")
    assert write_report(moved) == moved / "report" / "report.html"
    assert page(moved) == before
    (moved / "run.yaml").unlink()
    monkeypatch.chdir(moved)
    write_report(Path("."))
    assert "<h1>moved</h1>" in page(moved)


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
        ("run.yaml", "a: [", r"run\.yaml cannot be read"),
        ("run.yaml", "[1]", "holds a list, expected a mapping"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = build_run(tmp_path / "run", steps=3)
    (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert not (run / "report").exists()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", stages={})
    (run / "report").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write to .*report"):
        write_report(run)


def test_a_report_leaves_no_temporary_files(full: Path) -> None:
    names = {"report.html", "stages.csv", "by_distance.csv", *(f"{name}.png" for name in FIGURES)}
    assert {file.name for file in (full / "report").iterdir()} == names


# ---- words and numbers


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (STAGES, "H1-5/10 keeps 97.9% of the teacher's mean generative accuracy (95.5% against 97.5%)"),
        ({5: ([1], 0.95, 0.9)}, "decodes 0.90\u00d7 as fast as the teacher, that is, slower"),
        ({5: ([1], 0.5, 1.4), 7: ([2], 0.6, 1.5)}, "No hybrid keeps 95% of the teacher's mean generative accuracy"),
        ({5: ([1], 0.5, 1.4), 7: ([2], 0.6, 1.5)}, "The nearest is H1-7/10, which keeps 60.5%"),
    ],
)
def test_summary(tmp_path: Path, stages: dict[int, Any], words: str) -> None:
    run = read_run(build_run(tmp_path / "run", stages, steps=3))
    assert words in summary(run, stage_frame(run))


def test_cost_follows_the_lineage(tmp_path: Path) -> None:
    """A stage from the middle of another costs that part of it; one from the teacher, nothing of the others."""
    path = build_run(tmp_path / "run", {5: STAGES[5], 7: ([2, 3], 0.98, 1.9)}, steps=4)
    file = path / "stages/02-H1-7/train/train.json"
    record = json.loads(file.read_text())
    for start, shares, minutes in (
        (None, [1.0, 1.0], "4.6"),
        ("H1-5/10", [1.0, 1.0], "4.6"),
        ("H1-5/10@1", [0.25, 1.0], "2.9"),
        ("teacher", [1.0], "2.3"),
        ("other/checkpoint", [1.0], "2.3"),
    ):
        write_json(file, record if start is None else {**record, "start": start})
        run = read_run(path)
        assert [share for _, share in lineage_of(run.stages, run.stages[1])] == shares
        assert f"{minutes} minutes of training" in summary(run, stage_frame(run))


def test_summary_without_speed(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", {5: STAGES[5]}, steps=3)
    edit(run / "stages" / "01-H1-5" / "measure" / "measure.json", headline=None)
    assert "no speed has been measured" in summary(read_run(run), stage_frame(read_run(run)))


def test_table_is_one_block_where_it_fits(partial: Path, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", steps=200)
    for file in run.rglob("measure.json"):
        edit(file, accuracy=json.loads(file.read_text())["accuracy"][:2])
    lines = table(run).splitlines()
    assert max(map(len, lines)) <= TERMINAL
    rule = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    assert [line.split()[0] for line in lines[rule + 1 :]] == ["teacher", "H1-5/10", "H1-7/10"]
    assert len({len(line) for line in lines[rule:]}) == 1
    assert lines[rule + 2].split()[-7:] == ["11,616", "1.43\u00d7", "160.0", "+", "1.4", "0.82M", "2.3"]
    assert lines[rule + 2].split()[1] == "96.5\u00b11.7"
    assert " 0 " not in table(partial) and NOT_MEASURED in table(partial)


def with_tasks(run: Path, tasks: dict[str, str], stderr: float = 0.0) -> Path:
    """The run with other tasks, each at 100%: the widest value."""
    rows = [{"task": t, "kind": k, "metric": "acc", "value": 1.0, "stderr": stderr, "n": 9} for t, k in tasks.items()]
    for file in run.rglob("measure.json"):
        edit(file, accuracy=rows)
    return run


FAMILIES = dict.fromkeys(["add", "mod", "chase", "recall", "sort"], "generative")


def test_the_demos_table_is_cut_in_two(tmp_path: Path) -> None:
    """The tasks above; below, the mean beside what it costs: each within the terminal."""
    run = with_tasks(build_run(tmp_path / "run", steps=3), {**FAMILIES, "embedded_choice": "multiple_choice"})
    text = table(run)
    assert max(map(len, text.splitlines())) <= TERMINAL == 100
    accuracy, cost = text.split("\n\n")
    assert accuracy.splitlines()[-1].split() == ["H1-7/10", *["100.0\u00b10.0"] * 6]
    last = "H1-7/10 100.0\u00b10.0 13,890 1.71\u00d7 96.0 + 1.9 24.6K 2.3"
    assert cost.splitlines()[-1].split() == last.split()


def test_the_cache_is_that_of_the_largest_batch_and_longest_context(full: Path, tmp_path: Path) -> None:
    """Keys and values apart from states; the teacher's as the stages found it where it is not measured alone."""
    frame = stage_frame(read_run(full))
    assert list(frame["kv_bytes"]) == [32 * left * 2048 * 512 for left in (10, 5, 3)]
    assert list(frame["state_bytes"]) == [32 * replaced * 9000 for replaced in (0, 5, 7)]
    assert "in the cache of the whole batch (batch 32, context 2,048)" in page(full)
    run = shutil.copytree(full, tmp_path / "run")
    shutil.rmtree(run / "teacher")
    assert stage_frame(read_run(run)).loc[0, "kv_bytes"] == frame.loc[0, "kv_bytes"]
    file = run / "stages" / "01-H1-5" / "measure" / "measure.json"
    rows = json.loads(file.read_text())["throughput"]
    edit(file, throughput=[{k: v for k, v in row.items() if k not in ("kv_bytes", "state_bytes")} for row in rows])
    assert table_rows(stage_frame(read_run(run)), TASKS)[2][-3] == NOT_MEASURED, "a record of before they were told"


def test_a_mean_of_one_task_has_no_column(full: Path, tmp_path: Path) -> None:
    header = table_rows(stage_frame(read_run(full)), TASKS)[0]
    assert "mean generative" in header and "mean choice" not in header
    tasks = {"a": "generative", "b": "multiple_choice", "c": "multiple_choice"}
    run = read_run(with_tasks(build_run(tmp_path / "run", steps=3), tasks))
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
    assert drawing.count(tokens) == text


# ---- drawing


@pytest.mark.parametrize("width", [drawing.WIDE, drawing.NARROW])
@pytest.mark.parametrize("crowd", [[0.96, 0.955, 0.93, 0.9, 0.86, 0.83], [0.98, 0.98, 0.7, 0.9, 0.6, 0.95]])
def test_labels_of_the_pareto_plot_stand_free(width: float, crowd: list[float]) -> None:
    speeds = [12_591, 13_159, 14_459, 16_652, 18_683, 21_120]
    rows = [
        {"name": f"H1-{25 + i}/50", "generative": y, "ratio": x / 8123}
        for i, (x, y) in enumerate(zip(speeds, crowd, strict=True))
    ]
    frame = pd.DataFrame([{"name": "teacher", "generative": 0.975, "ratio": 1.0}, *rows])
    frame = frame.assign(generative_stderr=0.01, tokens=55.9e9)
    figure = figures.pareto(frame.assign(frontier=on_frontier(frame)), width)
    boxes = text_boxes(figure)
    assert len(boxes) == 7
    axes = figure.axes[0].get_window_extent()
    for i, box in enumerate(boxes):
        assert axes.x0 <= box.x0 and box.x1 <= axes.x1 and axes.y0 <= box.y0 and box.y1 <= axes.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


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


def test_a_fine_tuned_stage_follows_its_stage(tmp_path: Path) -> None:
    run = read_run(tune(build_run(tmp_path / "run"), 1, 0.98, 1.42))
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
    write_report(run.path)
    assert "tuning.png" in {path.name for path in (run.path / "report").iterdir()}
    assert "H1-5/10-SFT" in (run.path / "report/report.html").read_text()


def test_without_fine_tuning_nothing_is_said_of_it(full: Path) -> None:
    run = read_run(full)
    assert run.models == list(run.stages)
    text = (full / "report/report.html").read_text()
    assert "Fine-tuning" not in text and "Squares" not in text


def test_best_hybrid_is_not_chosen_by_noise_between_equally_fast_models(tmp_path: Path) -> None:
    """The fine-tuned model is the stage's equal in speed; the more accurate of the two counts, and its cost."""
    for level, best, minutes in ((0.98, "H1-5/10-SFT", "3.1"), (0.955, "H1-5/10", "2.3")):
        run = read_run(tune(build_run(tmp_path / best.replace("/", "-")), 1, level, 1.42 if level > 0.96 else 1.5))
        text = summary(run, stage_frame(run))
        assert text.startswith(f"{best} keeps")
        assert f"{minutes} minutes of training" in text


def test_a_fine_tuning_that_was_cut_short_is_missing(tmp_path: Path) -> None:
    run = tune(build_run(tmp_path / "run"), 1, 0.98, 1.42, steps=())
    config = yaml.safe_load((run / "run.yaml").read_text())
    (run / "run.yaml").write_text(yaml.safe_dump({**config, "sft": {"steps": 300}}))
    assert missing(read_run(run)) == ["H1-5/10-SFT: lacks train (reached step 100 of 300), merge, measure"]
    line = next(line for line in table(run).splitlines() if line.startswith("H1-5/10-SFT"))
    assert NOT_MEASURED in line


def test_a_fine_tuned_stage_keeps_its_colour_and_has_a_square(tmp_path: Path) -> None:
    names = ["teacher", "H1-5/10", "H1-5/10-SFT", "H1-7/10"]
    colours = drawing.model_colours(names)
    assert colours["H1-5/10-SFT"] == colours["H1-5/10"] != colours["H1-7/10"]
    assert colours["H1-7/10"] == drawing.model_colours(["H1-5/10", "H1-7/10"])["H1-7/10"]
    assert [drawing.marker(name) for name in names] == ["D", "o", "s", "o"]
    run = read_run(tune(build_run(tmp_path / "run"), 2, 0.98, 1.42))
    axes = figures.pareto(stage_frame(run)).axes[0]
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
