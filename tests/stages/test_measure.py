"""``distill measure CHECKPOINT...``: a table, records that the report reads, what is done is not done again; and a
run's measuring that goes on with the next task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.records import forget
from eval import decoding
from eval import lm as asking
from eval.wellformed import problem
from stages import checkpoints
from stages.cli import main
from stages.common import open_run

Capture = pytest.CaptureFixture[str]
Build = Callable[[list[str]], list[str]]
FEW = ["measure.generative=[embedded_add]", "measure.multiple_choice=[embedded_choice]", "measure.limit=2", "threads=1"]


def test_a_teacher_and_a_hybrid_side_by_side(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    hybrid, output = tiny / "run/stages/01-H1-1", tmp_path / "out.json"
    command = ["measure", str(tiny / "teacher"), str(hybrid), *FEW, "--output", str(output)]
    assert main(command) == 0
    text = capsys.readouterr().out
    records = json.loads(output.read_text())
    assert [problem("measure", record) for record in records] == ["", ""]
    assert [(record["name"], record["replaced"], record["num_blocks"]) for record in records] == [
        ("teacher", 0, 3),
        ("01-H1-1", 1, 3),
    ]
    for record in records:
        assert [(row["task"], row["kind"], row["n"]) for row in record["accuracy"]] == [
            ("add", "generative", 2), ("embedded_choice", "multiple_choice", 2),
        ]  # fmt: skip
        assert all("stderr" in row for row in record["accuracy"])
    row = next(line for line in text.splitlines() if line.startswith("add "))
    assert row.count("±") == 2, text
    counts = [record["accuracy"][0] for record in records]
    assert all(row["truncated"] + row["empty"] + row["cut"] <= 2 for row in counts)

    before = output.read_text()
    assert main(command) == 0
    assert output.read_text() == before and "is in" in capsys.readouterr().out
    assert main([*command, "measure.limit=1"]) == 2
    assert "with other settings: name another --output" in capsys.readouterr().err
    assert main([*command, "measure.limit=1", "--force"]) == 0
    assert {row["n"] for record in json.loads(output.read_text()) for row in record["accuracy"]} == {1}


def test_the_run_that_stopped_goes_on_with_the_next_task(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Non-finite logits in the second task: the first one's record stays, and is not made again."""
    run = tmp_path / "run"
    shutil.copytree(tiny / "run", run)
    for folder in ("stages/01-H1-1/measure", "teacher"):
        shutil.rmtree(run / folder)
    tasks = ["measure.generative=[embedded_add,embedded_mod]", "--stage", "1"]
    generate, seen = asking.LM._generate, []

    def poisoned(self: Any, batch: list[Any]) -> Any:
        seen.append(batch[0].task)
        if batch[0].task == "embedded_mod" and seen.count("embedded_mod") == 1:
            raise decoding.not_finite(self.name, "embedded_mod", 0)
        return generate(self, batch)

    monkeypatch.setattr(asking.LM, "_generate", poisoned)
    for other in run.glob("stages/*/measure"):
        shutil.rmtree(other)
    assert main(["measure", str(run), *tasks]) == 2
    error = capsys.readouterr().err
    assert f"teacher ({tiny}/teacher) gives logits that are not finite" in error and "'embedded_mod'" in error
    kept = run / "teacher.partial/tasks/generative/embedded_add.json"
    assert kept.is_file()
    assert main(["measure", str(run), *tasks]) == 0
    assert seen == ["embedded_add", "embedded_mod", "embedded_mod", "embedded_add", "embedded_mod"]
    for folder in ("teacher", "stages/01-H1-1/measure"):
        assert sorted(path.name for path in (run / folder).iterdir()) == ["measure.json", "step.json"]


def test_a_tokenizer_other_than_the_teachers_is_refused(build: Build, tmp_path: Path, capsys: Capture) -> None:
    command = build(["measure", "{tmp}/run", "--stage", "1"])
    folder = tmp_path / "run/stages/01-H1-1"
    shutil.rmtree(folder / "measure")
    for step in folder.glob("*/step.json"):
        record = json.loads(step.read_text())
        record.pop("files", None)
        step.write_text(json.dumps(record))
    file = folder / "train/checkpoint/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    file.write_text(json.dumps(content))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "is not the teacher's" in error and "2 tokens differ, such as '7'" in error
    tasks = ["measure.generative=[embedded_add]", "measure.multiple_choice=[]", "measure.limit=1"]
    assert main(["measure", *build(["{tiny}/teacher"]), str(folder), *tasks]) == 0
    assert "note: the tokenizer of 01-H1-1 is not that of teacher: 2 tokens differ" in capsys.readouterr().out
    start = [
        "run", str(tmp_path.parent / "none.yaml"), f"run_dir={tmp_path}/new",
        "start_from={H1-2: " + str(folder / "train/checkpoint") + "}",
    ]  # fmt: skip
    start[1] = build(["{tiny}/tiny.yaml"])[0]
    assert main([*start, "schedule=[2]"]) == 2
    assert "is not the teacher's" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_names_tell_checkpoints_apart() -> None:
    assert checkpoints.names(["embedded", "runs/a/stages/01-H1-5/train/checkpoint", "Qwen/Qwen3-8B"]) == [
        "embedded", "01-H1-5", "Qwen/Qwen3-8B",
    ]  # fmt: skip
    same = ["runs/a/stages/01-H1-5", "runs/b/stages/01-H1-5"]
    assert checkpoints.names(same) == same


def test_the_table_shows_counts_where_there_are_any() -> None:
    def record(name: str, **counts: int) -> dict[str, Any]:
        row = {"task": "gsm8k", "value": 0.5, "stderr": 0.1, **counts}
        return {"name": name, "accuracy": [row]}

    other = {"name": "c", "accuracy": [{"task": "arc", "value": 1.0, "stderr": 0.0}]}
    lines = checkpoints.table([record("a", truncated=3, empty=0), record("b", truncated=0, empty=0), other])
    assert [line.split() for line in lines.splitlines()[2:]] == [
        ["gsm8k", "50.0", "±", "10.0", "50.0", "±", "10.0", "-"],
        ["truncated", "3", "0", "-"],
        ["arc", "-", "-", "100.0", "±", "0.0"],
    ]


def test_memory_that_does_not_suffice_halves_the_batch_and_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["measure", str(tiny / "teacher"), *FEW, "measure.limit=4"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    generate = asking.LM._generate

    def small(self: Any, batch: list[Any]) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, batch)

    monkeypatch.setattr(asking.LM, "_generate", small)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    (halved,) = [line for line in lines if "out of memory" in line]
    assert halved.endswith("out of memory generating for task 'embedded_add': batch 4 -> 2")
    assert [line for line in lines if line != halved] == expected.splitlines()


def test_the_measure_of_a_file_goes_with_the_training_that_it_came_from(build: Build, tmp_path: Path) -> None:
    """Or the report would have the speed of one model beside the tokens of another."""
    (run,) = build(["{tmp}/run"])
    folders = [Path(run) / "gguf" / name / "measure" for name in ("01-H1-1-Q8_0", "02-H1-2-Q8_0")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "step.json").write_text("{}")
    context = open_run(run, [], write=False)
    forget(context.steps(), {"02-H1-2/measure"})
    assert [folder.exists() for folder in folders] == [True, True]
    forget(context.steps(), {"02-H1-2/train"})
    assert [folder.exists() for folder in folders] == [True, False]
