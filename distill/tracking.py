"""Training curves for TensorBoard, always and locally, and for Weights & Biases where asked for.

Both get the very lines of ``log.jsonl``, when they are appended: each stage is a run of its own there, ``01-H1-5``.
To look at them: ``tensorboard --logdir RUN/tensorboard``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.records import fingerprint


@dataclass
class Tracker:
    """Where the lines of one run folder's logs go."""

    run_dir: Path
    name: str
    project: str
    writers: dict[str, Any] = field(default_factory=dict)
    """TensorBoard's, by series."""
    online: tuple[str, Any] | None = None
    """Series and run that Weights & Biases is following."""

    def record(self, log: Path, event: Mapping[str, Any]) -> None:
        """Pass on a line that was appended to ``log``, if that is a log of this run."""
        if not log.resolve().is_relative_to(self.run_dir):
            return
        series = log.parent.parent.name
        values = {key: float(value) for key, value in event.items() if key != "step" and _is_number(value)}
        step = int(event.get("step", 0))
        writer = self._writer(series, step if "loss" in event else None)
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()
        if self.project:
            self._run(series).log({**values, "step": step})

    def _writer(self, series: str, step: int | None) -> Any:
        """TensorBoard's writer of a series. A resumed training goes on from ``step``: what a session before it has
        written of later steps is dropped by the reader."""
        if series not in self.writers:
            make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.writers[series] = make(str(self.run_dir / "tensorboard" / series), purge_step=step)
        return self.writers[series]

    def _run(self, series: str) -> Any:
        """The Weights & Biases run of a series; the one before it is finished. Resumed, it is the same one."""
        if self.online is None or self.online[0] != series:
            if self.online is not None:
                self.online[1].finish()
            identity = fingerprint([str(self.run_dir), series])
            run = importlib.import_module("wandb").init(
                project=self.project, group=self.name, name=series, id=identity, resume="allow", dir=str(self.run_dir)
            )
            run.define_metric("*", step_metric="step")
            self.online = (series, run)
        return self.online[1]

    def close(self) -> None:
        """Close all files and runs."""
        for writer in self.writers.values():
            writer.close()
        if self.online is not None:
            self.online[1].finish()


_active: list[Tracker] = []


def check(project: str) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed."""
    if project and util.find_spec("wandb") is None:
        raise UserError(
            f"tracking.wandb={project} needs the package wandb, which is not installed: pip install wandb, or leave "
            "tracking.wandb out (TensorBoard's files are written in any case)"
        )


def begin(run_dir: Path, name: str, project: str = "") -> None:
    """From now on, pass on what is appended to the logs of ``run_dir``."""
    check(project)
    end()
    _active.append(Tracker(run_dir.resolve(), name, project))


def record(log: Path, event: Mapping[str, Any]) -> None:
    """Pass on a line that was appended to ``log``, if a run has begun that it belongs to."""
    for tracker in _active:
        tracker.record(log, event)


def end() -> None:
    """Close what was begun."""
    while _active:
        _active.pop().close()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
