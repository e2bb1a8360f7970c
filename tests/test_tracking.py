"""TensorBoard's files and Weights & Biases from the log's lines: read back, resumed, refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill import tracking
from distill.errors import UserError
from distill.progress import append_line


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    tracking.end()


def log_of(run: Path, stage: str = "01-H1-5") -> Path:
    log = run / "stages" / stage / "train.partial" / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def scalars(run: Path, stage: str = "01-H1-5") -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / stage))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_log(tmp_path: Path) -> None:
    tracking.begin(tmp_path, "demo")
    for step in (1, 2, 3):
        append_line(log_of(tmp_path), {"step": step, "loss": 0.5 / step, "tokens": 64 * step, "note": "x", "on": True})
    append_line(log_of(tmp_path), {"step": 0, "eval_loss": 0.75})
    append_line(log_of(tmp_path, "02-H1-7"), {"step": 1, "loss": 0.25})
    shown = scalars(tmp_path)  # while the training goes on
    assert shown == {
        "loss": [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))],
        "tokens": [(1, 64), (2, 128), (3, 192)],
        "eval_loss": [(0, 0.75)],
    }
    assert scalars(tmp_path, "02-H1-7") == {"loss": [(1, 0.25)]}
    assert len(log_of(tmp_path).read_text().splitlines()) == 4


def test_a_resumed_training_takes_the_place_of_what_was_lost(tmp_path: Path) -> None:
    """The first session got to step 5, its checkpoint was of step 2."""
    for steps, level in ((range(1, 6), 1.0), (range(3, 7), 2.0)):
        tracking.begin(tmp_path, "demo")
        for step in steps:
            append_line(log_of(tmp_path), {"step": step, "loss": level})
        tracking.end()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_nothing_is_written_for_logs_outside_the_run(tmp_path: Path) -> None:
    append_line(log_of(tmp_path / "a"), {"step": 1, "loss": 1.0})  # none has begun
    tracking.begin(tmp_path / "b", "b")
    append_line(log_of(tmp_path / "a"), {"step": 1, "loss": 1.0})
    assert not list(tmp_path.rglob("events.*"))


def test_weights_and_biases_is_asked_for_and_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Online:
        def __init__(self, **options: Any) -> None:
            calls.append(("init", options["project"], options["group"], options["name"], options["id"]))

        def define_metric(self, *names: str, step_metric: str) -> None:
            calls.append(("metric", step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append("finish")

    fake = ModuleType("wandb")
    fake.__dict__.update(init=lambda **options: Online(**options), __spec__=json.__spec__)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ids = []
    for _ in range(2):
        tracking.begin(tmp_path, "demo", "my-project")
        append_line(log_of(tmp_path), {"step": 1, "loss": 0.5})
        append_line(log_of(tmp_path, "02-H1-7"), {"step": 1, "loss": 0.25})
        tracking.end()
        ids.append([call[4] for call in calls if call[0] == "init"])
        assert [call[:4] for call in calls if call[0] == "init"] == [
            ("init", "my-project", "demo", "01-H1-5"),
            ("init", "my-project", "demo", "02-H1-7"),
        ]
        assert [call[1] for call in calls if call[0] == "log"] == [{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 1}]
        assert calls.count("finish") == 2
        calls.clear()
    assert ids[0] == ids[1] and len(set(ids[0])) == 2, "a resumed stage goes on in the same run"


def test_weights_and_biases_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.wandb=x needs the package wandb, .*pip install wandb"):
        tracking.begin(tmp_path, "demo", "x")
