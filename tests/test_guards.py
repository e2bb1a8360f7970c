"""Bad losses: stopped at, left out, or gone back from, with their rows noted; resumed, the same again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import MixerConfig, TrainConfig
from distill.errors import UserError
from distill.guards import check_guards
from distill.hybrid.surgery import hybridize
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments

PLACEMENT = ["mamba1", "attention", "attention", "mamba1"]


def poisoned(*steps: int, by: float = float("nan")) -> type[DistillTrainer]:
    """A trainer whose loss is multiplied on the way to these steps, as a broken row of the data would do."""

    class Poisoned(DistillTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * by if self.state.global_step + 1 in steps else loss

    return Poisoned


def train(
    llama: Any, rows: Any, folder: Path, trainer: type[DistillTrainer], steps: int = 8, **keys: Any
) -> tuple[Any, DistillTrainer]:
    options = TrainConfig(**{"batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 2, "save_steps": 2, **keys})
    student = hybridize(llama, PLACEMENT, MixerConfig(), seed=0).train()
    arguments = training_arguments(options, steps, folder / "checkpoints", seed=0)
    folder.mkdir(exist_ok=True)
    done = fit(
        trainer, student, rows, arguments, title="test", log=folder / "log.jsonl", train=options,
        teacher=Teacher(llama), loss="reverse_kl", temperature=1.0,
    )  # fmt: skip
    assert isinstance(done, DistillTrainer)
    return student, done


def noted(folder: Path) -> list[tuple[int, list[int], str]]:
    events = [json.loads(line) for line in (folder / "guards.jsonl").read_text().splitlines()]
    return [(event["step"], event["rows"], event["policy"]) for event in events]


def test_a_bad_step_is_left_out(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> None:
    """Weights and moments stay as they were: the training ends as one whose step had no gradient at all."""

    class Without(DistillTrainer):
        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            if self.state.global_step == 4:
                model.zero_grad(set_to_none=True)
            return norm

    skipped, _ = train(llama, traces(16), tmp_path / "skip", poisoned(5), on_bad_loss="skip")
    expected, _ = train(llama, traces(16), tmp_path / "none", Without)
    assert noted(tmp_path / "skip") == [(5, [8, 9], "skip")]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, skipped.state_dict()[name]), name


def test_rolling_back_ends_as_leaving_out(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> None:
    back, _ = train(llama, traces(16), tmp_path / "back", poisoned(6), on_bad_loss="roll_back")
    skipped, _ = train(llama, traces(16), tmp_path / "skip", poisoned(6), on_bad_loss="skip")
    assert noted(tmp_path / "back") == [(6, [10, 11], "roll_back")]
    for name, tensor in skipped.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_a_spike_stops_and_names_its_rows(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss jumped \(.*\) at step 13: lower train.learning_rate.*rows 24 to 25"):
        train(llama, traces(32), tmp_path / "run", poisoned(13, by=100.0), steps=16, spike=5.0)
    assert noted(tmp_path / "run") == [(13, [24, 25], "stop")]
    assert (tmp_path / "run/checkpoints/checkpoint-12").is_dir()


def test_nothing_to_go_back_to(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint yet to go back to"):
        train(llama, traces(16), tmp_path / "run", poisoned(2), on_bad_loss="roll_back")


def test_too_many_in_a_row_stop(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the 11th in a row"):
        train(llama, traces(32), tmp_path / "run", poisoned(*range(2, 16)), steps=16, on_bad_loss="skip", save_steps=0)


@pytest.mark.parametrize(
    ("keys", "engine", "said"),
    [
        ({"on_bad_loss": "skipp"}, "ddp", "did you mean 'skip'?"),
        ({"on_bad_loss": "skip"}, "deepspeed", "whose engine updates the weights before anybody is asked"),
        ({"on_bad_loss": "roll_back", "save_steps": 5}, "fsdp", "cannot be prepared a second time"),
        ({"on_bad_loss": "roll_back"}, "ddp", "set train.save_steps"),
        ({"spike": 0.5}, "ddp", "train.spike=0.5 must be above 1"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], engine: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_guards(TrainConfig(**keys), engine)
    assert said in str(caught.value)
