"""A speed in place of h: read, predicted, taken from records, kept by the run; what cannot be had says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from distill.config import RunConfig
from distill.config_merge import dump_config, load_config, merge_config
from distill.errors import UserError
from eval.machine import DEVICES
from eval.roofline import shapes_of
from stages.cli import main
from stages.plan import teacher_config
from stages.speedup import Speed, Target, parse, predicted, replaced, settle, smallest
from stages.targets import config_path

H100 = "plan.device=h100"


def paper(*overrides: str) -> RunConfig:
    return load_config(RunConfig, config_path("apriel_h1_15b"), [H100, *overrides])


def test_what_a_target_says() -> None:
    assert parse("1.8x at 16k", [1, 32]) == Target(1.8, 16384, 32)
    assert parse(" 2x at 4096, batch 64", [1]) == Target(2.0, 4096, 64)
    assert parse("1.5x at 128k, equal memory", [1]) == Target(1.5, 131072, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "cannot be read: give how many times as fast, and at which length, such as '1.8x at 16k'"),
        ("1.8 at 16k", "cannot be read"),
        ("1.8x at 16k, batch x", "cannot be read"),
        ("1x at 16k", "must be above 1x"),
        ("1.8x at 1", "at least 2 tokens"),
        ("1.8x at 16k, batch 0", "at least 1 sequence"),
    ],
)
def test_a_target_of_another_form(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text, [32])


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_every_h_is_extrapolated_exactly(mixer: str) -> None:
    teacher = teacher_config(paper())
    base, one, five = shapes_of(teacher, (0, 1, 5), (mixer,), paper().mixer, 2).values()
    assert replaced(base, one, 5) == five and replaced(base, one, 1) == one and replaced(base, one, 0) == base


def test_h_is_the_smallest_that_reaches_the_target() -> None:
    config = paper("target='1.5x at 16k'")
    lines: list[str] = []
    settle(config, teacher_config(config), lines.append)
    h = config.schedule[-1]
    speeds = predicted(config, teacher_config(config), parse(config.target, [64]), DEVICES["h100"])
    assert speeds[h].ratio >= 1.5 > speeds[h - 1].ratio and sorted(speeds) == list(range(1, 50))
    assert config.schedule[:-1] == [each for each in (25, 27, 30, 34, 37, 40) if each < h]
    assert f"H1-{h}/50, {speeds[h].ratio:.2f}x predicted (on H100 SXM; H1-{h - 1}: " in lines[0]


def test_equal_memory_counts_the_larger_batches_of_a_hybrid() -> None:
    config = paper()
    both = [
        predicted(config, teacher_config(config), parse(f"1.5x at 16k{more}", [64]), DEVICES["h100"])[40].ratio
        for more in ("", ", equal memory")
    ]
    assert both[1] > 1.3 * both[0]


def test_what_cannot_be_reached_names_the_best() -> None:
    with pytest.raises(UserError, match=r"cannot be reached on H100 SXM: the best is H1-49/50 with \d\.\d\dx \(pred"):
        settle(paper("target='40x at 16k'"), teacher_config(paper()), print)
    slower = {1: Speed(0.98, "predicted"), 2: Speed(0.95, "predicted")}
    with pytest.raises(UserError, match="the best is H1-1/3 with 0.98x"):
        smallest("1.1x at 16", Target(1.1, 16, 1), slower, DEVICES["h100"])


def recorded(folder: Path, ratios: dict[int, float], **changes: Any) -> Path:
    """A run folder that has measured these ratios at batch 64 and 16,384 tokens."""
    config = dataclasses.replace(paper(), schedule=sorted(ratios), run_dir=str(folder), **changes)
    folder.mkdir()
    (folder / "run.yaml").write_text(dump_config(config))
    for number, (h, ratio) in enumerate(sorted(ratios.items()), 1):
        measure = folder / "stages" / f"{number:02d}-H1-{h}" / "measure"
        measure.mkdir(parents=True)
        row = {"model": f"H1-{h}/50", "protocol": "equal_batch", "batch": 64, "output_tokens": 16384, "ratio": ratio}
        record = {"name": f"H1-{h}/50", "accuracy": [], "throughput": [], "serving": {"one_in_n_out": [row]}}
        (measure / "measure.json").write_text(json.dumps(record))
    return folder


def test_what_was_recorded_counts_before_what_is_predicted(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", {25: 1.62, 30: 1.9})
    config = paper("target='1.6x at 16k'", f"plan.records=[{run}]")
    lines: list[str] = []
    settle(config, teacher_config(config), lines.append)
    assert config.schedule == [25] and f"1.62x recorded in {run}" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"teacher": "another"}, "has teacher=another, and this run teacher="), (None, "is no run folder")],
)
def test_records_of_another_run(tmp_path: Path, changes: dict[str, Any] | None, message: str) -> None:
    run = tmp_path / "run" if changes is None else recorded(tmp_path / "run", {25: 2.0}, **changes)
    config = paper("target='1.6x at 16k'", f"plan.records=[{run}]")
    with pytest.raises(UserError, match=f"plan.records: {run} {message}"):
        settle(config, teacher_config(config), print)


def test_a_run_keeps_what_its_target_resolved_to(tmp_path: Path) -> None:
    """However the device measures the next time; with another target it is resolved anew."""
    config = paper("target='1.5x at 16k'", f"run_dir={tmp_path}")
    settle(config, teacher_config(config), lambda line: None)
    (tmp_path / "run.yaml").write_text(dump_config(dataclasses.replace(config, schedule=[25, 27, 30, 33])))
    again, other = (paper(f"target='{text} at 16k'", f"run_dir={tmp_path}") for text in ("1.5x", "1.2x"))
    lines: list[str] = []
    for each in (again, other):
        settle(each, teacher_config(each), lines.append)
    assert again.schedule == [25, 27, 30, 33] and "as resolved before" in lines[0]
    assert other.schedule[-1] < 33 and "predicted" in lines[1]


def test_what_a_target_resolved_to_takes_other_stages_before_it(tmp_path: Path) -> None:
    config = paper("target='1.5x at 16k'", f"run_dir={tmp_path}")
    (tmp_path / "run.yaml").write_text(dump_config(dataclasses.replace(config, schedule=[25, 33])))
    other = paper("target='1.5x at 16k'", f"run_dir={tmp_path}", "schedule=[10,20,40]")
    settle(other, teacher_config(other), lambda line: None)
    assert other.schedule == [10, 20, 33]


def test_a_target_at_another_batch_is_another_target(tmp_path: Path) -> None:
    config = paper("target='1.5x at 16k'", f"run_dir={tmp_path}")
    (tmp_path / "run.yaml").write_text(dump_config(dataclasses.replace(config, schedule=[25, 49])))
    other = paper("target='1.5x at 16k'", f"run_dir={tmp_path}", "measure.throughput.batches=[128]")
    settle(other, teacher_config(other), lambda line: None)
    assert other.schedule[-1] < 49


def test_plan_shows_the_stages_that_a_target_resolves_to(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "configs/apriel_h1_15b.yaml", "train.steps_by_stage=[]"]
    assert main([*command, H100, "target=1.5x at 16k"]) == 0
    text = capsys.readouterr().out
    last = [line.split()[0] for line in text.splitlines() if line.startswith("H1-")][-1]
    assert f"target    1.5x at 16k: {last}, 1.5" in text
    assert main([*command, "plan.device=h1000", "target=1.5x at 16k"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err


def test_without_a_target_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = merge_config(RunConfig, [], [])
    settle(config, None, print)
    assert config.schedule == []
