"""Which models of a training are kept: the newest checkpoints, as many as asked for, and the best of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from distill.checkpoints import checkpoints_of, fault
from distill.config import MixerConfig, TrainConfig
from distill.hybrid.surgery import hybridize
from distill.progress import KeepBest
from distill.trainer import LanguageTrainer, fit, training_arguments

Traces = Callable[..., Any]


class Killed(Exception):
    """In place of a kill."""


def train(
    llama: Any, rows: Any, folder: Path, losses: dict[int, float], *, kill: int = 0, **keys: Any
) -> tuple[Any, list[int]]:
    """Train eight steps, the held-out loss after each as ``losses`` has it; the model, and when it was asked for."""
    options = TrainConfig(**{"batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 0, "save_steps": 2, **keys})
    model = hybridize(llama, ["mamba1", "attention", "attention", "attention"], MixerConfig(), seed=0).train()
    asked: list[int] = []

    class Step(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.now = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if kill and state.global_step == kill:
                raise Killed

    step = Step()

    def evaluate() -> float:
        asked.append(step.now)
        return losses[step.now]

    def save(target: Path, number: int) -> None:
        model.save_pretrained(target)

    arguments = training_arguments(options, 8, folder / "checkpoints", seed=0)
    best = KeepBest(folder / "best", evaluate, save)
    fit(LanguageTrainer, model, rows, arguments, title="t", log=None, callbacks=[step, best])
    return model, asked


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (3, [8, 6, 4])])
def test_the_newest_checkpoints_are_kept(
    llama: Any, traces: Traces, tmp_path: Path, keep: int, left: list[int]
) -> None:
    train(llama, traces(16), tmp_path, dict.fromkeys(range(9), 1.0), keep_checkpoints=keep)
    found = checkpoints_of(tmp_path / "checkpoints")
    assert list(found) == left
    assert all(fault(path) is None for path in found.values())


def same(file: Path, model: Path) -> bool:
    ours, theirs = load_file(file), load_file(model)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}, 4),
        pytest.param({2: 3.0, 4: 2.0, 6: 2.5, 8: 1.0}, 8, marks=pytest.mark.slow),
    ],
)
def test_the_best_of_those_that_were_evaluated_is_kept(
    llama: Any, traces: Traces, tmp_path: Path, losses: dict[int, float], step: int
) -> None:
    """The first of equals; beside the newest checkpoints, its own not among them. Killed on the way (before and after
    it was found), the same."""
    _, asked = train(llama, traces(16), tmp_path / "whole", losses, keep_checkpoints=4)
    assert asked == [2, 4, 6, 8]
    assert json.loads((tmp_path / "whole/best.json").read_text()) == {"step": step, "eval_loss": losses[step]}
    best = tmp_path / "whole/best/model.safetensors"
    assert same(best, tmp_path / f"whole/checkpoints/checkpoint-{step}/model.safetensors")
    for kill in (3, 5, 7):
        folder = tmp_path / f"cut{kill}"
        with pytest.raises(Killed):
            train(llama, traces(16), folder, losses, kill=kill, keep_checkpoints=1)
        train(llama, traces(16), folder, losses, keep_checkpoints=1)
        assert list(checkpoints_of(folder / "checkpoints")) == [8]
        assert (folder / "best.json").read_text() == (tmp_path / "whole/best.json").read_text()
        assert same(folder / "best/model.safetensors", best)


def test_without_checkpoints_the_end_is_the_best(llama: Any, traces: Traces, tmp_path: Path) -> None:
    _, asked = train(llama, traces(16), tmp_path, {8: 1.0}, save_steps=0)
    assert asked == [8] and json.loads((tmp_path / "best.json").read_text())["step"] == 8
