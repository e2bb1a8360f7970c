"""Losses that are not finite or jump: seen at their step, named with its rows, and met as the config says.

`stop` ends the training, the checkpoints before stand. `skip` leaves the step's update out. `roll_back` goes back to
the newest checkpoint and leaves the update out when it comes by again. What was found goes to ``guards.jsonl`` beside
the log. `skip` and `roll_back` decide on the loss of the global batch, so that all processes decide the same, and a
resumed training as the one that was not interrupted.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from distill import distributed
from distill.checkpoints import checkpoints_of
from distill.config import TrainConfig
from distill.errors import UserError, choose
from distill.storage import sync

POLICIES = ("stop", "skip", "roll_back")
WINDOW = 50
"""Logged losses whose median a spike is measured against."""
FIRST = 10
"""Losses that have to be logged before anything counts as a spike."""
LIMIT = 10
"""Steps in a row that may be left out before the training stops after all."""


class RollBack(Exception):
    """Raised on every process to go back to the newest checkpoint."""


def check_guards(train: TrainConfig, engine: str) -> None:
    """Raise UserError for policies that are not there or that the engine cannot follow."""
    choose("train.on_bad_loss", train.on_bad_loss, POLICIES)
    if train.spike and train.spike <= 1:
        raise UserError(f"train.spike={train.spike} must be above 1 (times the median loss), or 0 for none")
    if engine == "deepspeed" and train.on_bad_loss != "stop":
        raise UserError(
            f"train.on_bad_loss={train.on_bad_loss} with engine.name=deepspeed, whose engine updates the weights "
            "before anybody is asked: set train.on_bad_loss=stop, or engine.name=ddp or fsdp"
        )
    if engine == "fsdp" and train.on_bad_loss == "roll_back":
        raise UserError(
            "train.on_bad_loss=roll_back with engine.name=fsdp, whose model cannot be prepared a second time: set "
            "train.on_bad_loss=skip, or engine.name=ddp"
        )
    if train.on_bad_loss == "roll_back" and not train.save_steps:
        raise UserError("train.on_bad_loss=roll_back needs checkpoints to go back to: set train.save_steps")


def rows_of(args: TrainingArguments, step: int) -> tuple[int, int]:
    """The first and last row (from 0) of the global batch of ``step`` (from 1)."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (step - 1) * rows, step * rows - 1


class LogWhenSaving(TrainerCallback):
    """Logs every step of which a checkpoint is written."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or control.should_save


class StopOnNonFinite(LogWhenSaving):
    """Stop at the first loss or gradient that is NaN or infinite, naming the step, its rows of the data, and what to
    change (``key``: train or sft). A checkpoint is written only after this look at its step."""

    def __init__(self, key: str = "train") -> None:
        self.key = key

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        found = {name: logs[name] for name in ("loss", "grad_norm") if logs and logs.get(name) is not None}
        if all(torch.isfinite(torch.tensor(value)) for value in found.values()):
            return
        what = "loss" if not torch.isfinite(torch.tensor(found.get("loss", 0.0))) else "grad_norm"
        first, last = rows_of(args, state.global_step)
        raise _stopped(args, self.key, f"the {what} became {found[what]} at step {state.global_step}", first, last)


def _stopped(args: TrainingArguments, key: str, what: str, first: int, last: int) -> UserError:
    newest = next(iter(checkpoints_of(Path(str(args.output_dir))).values()), None)
    return UserError(
        f"{what}: lower {key}.learning_rate or raise {key}.warmup_steps, or look at the step's data (rows {first} to "
        f"{last}, from 0)\n"
        f"checkpoints written before are kept{f', the last is {newest}' if newest else ' (there are none yet)'}"
    )


class Guard(TrainerCallback):
    """Looks at the loss and the gradient of every global batch before the update.

    Args:
        policy: ``skip`` or ``roll_back``, or ``stop``, then only for spikes.
        spike: how many times the median of the last losses is too much (0: only what is not finite).
        record: the JSONL file of what was found; what is in it already is left out again.
    """

    def __init__(self, policy: str, spike: float, record: Path, key: str = "train") -> None:
        self.policy, self.spike, self.record, self.key = policy, spike, record, key
        self.loss = 0.0
        # of the process that writes it: another might not see its newest line yet
        self.bad: set[int] = set(distributed.agreed(lambda: [event["step"] for event in read_events(record)]))

    def take(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch of this process, as it counts in the global batch's times the processes."""
        self.loss += float(loss)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        step = state.global_step + 1
        loss, self.loss = distributed.summed(self.loss / args.world_size)[0], 0.0
        parameters = [p for p in given["model"].parameters() if p.grad is not None]
        bad_here = float(not all(bool(p.grad.isfinite().all()) for p in parameters))
        gradient = bool(distributed.summed(bad_here)[0])
        jumped = bool(self.spike) and loss > self.spike * self.usual(args, state)
        what = "loss not finite" if not math.isfinite(loss) else "gradient not finite" if gradient else "loss jumped"
        if step in self.bad:
            self.leave_out(parameters)
        elif gradient or jumped or not math.isfinite(loss):
            self.found(args, step, loss, what, parameters)

    def usual(self, args: TrainingArguments, state: Any) -> float:
        """The median of the last logged losses, which are part of every checkpoint: a resumed training has the same."""
        every = max(int(args.logging_steps), 1)
        losses = [
            entry["loss"]
            for entry in state.log_history
            if "loss" in entry and entry["step"] % every == 0 and entry["step"] not in self.bad
        ]
        return median(losses[-WINDOW:]) if len(losses) >= FIRST else math.inf

    def found(self, args: TrainingArguments, step: int, loss: float, what: str, parameters: list[Any]) -> None:
        """Note the batch and do what the policy says."""
        first, last = rows_of(args, step)
        event = {"step": step, "loss": loss if math.isfinite(loss) else str(loss), "what": what, "rows": [first, last]}
        if distributed.rank() == 0:
            with open(self.record, "a", encoding="utf-8") as file:
                file.write(json.dumps({**event, "policy": self.policy}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            sync(self.record.parent)
            print(f"{what} ({loss:.4g}) at step {step}, rows {first} to {last}: {self.policy}", flush=True)
        self.bad.add(step)
        run = next(back for back in range(step, -1, -1) if back not in self.bad)
        if self.policy == "stop" or step - run > LIMIT:
            several = f", the {LIMIT + 1}th in a row" if self.policy != "stop" else ""
            raise _stopped(args, self.key, f"{what} ({loss:.4g}) at step {step}{several}", first, last)
        if self.policy == "roll_back":
            raise RollBack
        self.leave_out(parameters)

    @staticmethod
    def leave_out(parameters: list[Any]) -> None:
        """An optimizer passes over a parameter without a gradient: weights and moments stay as they are."""
        for parameter in parameters:
            parameter.grad = None


def read_events(record: Path) -> list[dict[str, Any]]:
    """What was found so far; a line that a kill tore is left out."""
    events = []
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
