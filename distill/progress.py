"""What is told while a training runs: its bar, its log, the steps that are kept, and that a signal asked to stop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from distill import distributed, interrupt, tracking
from distill.records import read_json, write_json, write_text
from distill.storage import sync


class ProgressCallback(TrainerCallback):
    """A progress bar (or plain lines where there is no terminal) and one JSON line a log event.

    ``tokens`` counts what the global batches held, padding included; times are only shown, never used. ``minutes``
    go on from those of earlier sessions in the same log, work that was lost and done again included.
    """

    def __init__(self, title: str, steps: int, tokens_per_step: int, log: Path | None) -> None:
        self.title, self.steps, self.tokens_per_step, self.log = title, steps, tokens_per_step, log
        self.terminal = sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first, self.shown = time.monotonic(), state.global_step, 0.0
        if not state.is_world_process_zero:
            self.log, self.terminal = None, False
        self.earlier = logged_minutes(self.log) if self.log is not None else 0.0
        if self.log is not None and self.log.exists():  # a resumed run drops lines past its checkpoint
            kept = [line for line in self.log.read_text().splitlines() if step_of(line) <= state.global_step]
            write_text(self.log, "".join(line + "\n" for line in kept))
        if self.terminal:
            self.bar = tqdm(total=self.steps, initial=self.first, desc=self.title, unit="step", dynamic_ncols=True)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        elapsed = max(time.monotonic() - self.began, 1e-9)
        speed = (step - self.first) * self.tokens_per_step / elapsed
        event = {
            "step": step,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": round(speed, 1),
            "minutes": round(self.earlier + elapsed / 60, 4),
        }
        if self.log is not None:
            append_line(self.log, event)
            if control.should_save:  # the log up to a checkpoint is to outlive what the checkpoint outlives
                sync(self.log)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f} lr {logs['learning_rate']:.1e} {speed:,.0f} tok/s")
        elif time.monotonic() - self.shown > 10 or step == self.steps:
            self.shown = time.monotonic()
            left = (self.steps - step) * elapsed / max(step - self.first, 1)
            print(
                f"{self.title}: {step}/{self.steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"
                f"  {speed:,.0f} tok/s  {left:.0f} s left",
                flush=True,
            )

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Countdown:
    """Tells on a line, every ten seconds, how far a work of ``total`` steps is and how long it will still take."""

    def __init__(self, title: str, total: float) -> None:
        self.title, self.total, self.done = title, total, 0.0
        self.began = self.shown = time.monotonic()

    def step(self, steps: float = 1) -> None:
        """``steps`` more are done."""
        self.reach(self.done + steps)

    def reach(self, done: float) -> None:
        """``done`` of the steps are."""
        self.done, now = done, time.monotonic()
        if now - self.shown > 10 and done:
            self.shown = now
            print(f"{self.title}: {100 * done / self.total:.0f}%, {self.left()}", flush=True)

    def left(self) -> str:
        """``40 s left``."""
        return f"{(self.total - self.done) * (time.monotonic() - self.began) / max(self.done, 1e-9):.0f} s left"


def step_of(line: str) -> float:
    """The step of a log line; infinity for a torn one, or one of the end of a training, which is not resumed from."""
    try:
        event = json.loads(line)
        return float(event["step"]) if "loss" in event else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def logged_minutes(log: Path) -> float:
    """Minutes of training up to the last line of a log, over all sessions; 0.0 for a log that is not there."""
    minutes = 0.0
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            minutes = max(minutes, float(json.loads(line).get("minutes", 0.0)))
        except ValueError:  # a torn line is what a killed session leaves
            continue
    return minutes


class KeepSteps(TrainerCallback):
    """Calls ``keep(step)`` on every process when each of ``steps`` is done, before Trainer's own checkpoint of that
    step: what a resumed run finds before its checkpoint has been kept."""

    def __init__(self, steps: Collection[int], keep: Callable[[int], None]) -> None:
        self.steps, self.keep = steps, keep

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.keep(state.global_step)


class KeepBest(TrainerCallback):
    """At every checkpoint that the config asks for (not where a signal did: time is short), and at the end, takes the
    held-out loss, and keeps the weights where it is the lowest so far.

    Args:
        target: the model's folder; ``best.json`` beside it says which it is (step, eval_loss).
        evaluate: the held-out loss, the same on every process.
        save: writes the model to a folder, called on every process.
    """

    def __init__(self, target: Path, evaluate: Callable[[], float], save: Callable[[Path, int], None]) -> None:
        self.target, self.evaluate, self.save = target, evaluate, save

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        planned = args.save_strategy == "steps" and state.global_step % args.save_steps == 0
        if not (planned or state.global_step == state.max_steps):
            return
        record = self.target.with_name("best.json")
        best = distributed.agreed(lambda: read_json(record) if record.is_file() and self.target.is_dir() else None)
        loss = self.evaluate()
        if best is not None and best["step"] < state.global_step and best["eval_loss"] <= loss:
            return
        self.save(self.target, state.global_step)
        if state.is_world_process_zero:
            write_json(record, {"step": state.global_step, "eval_loss": loss})


class StopWhenAsked(TrainerCallback):
    """Ends a training after the step in which a signal asked for it, with a checkpoint of that step: the same step on
    all processes, whichever the signal reached."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if number := distributed.largest(interrupt.number()):
            interrupt.agree(number)
            control.should_save = control.should_training_stop = True


def append_line(path: Path, event: dict[str, Any]) -> None:
    """Append one JSON line; those who follow the run get it, too."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    tracking.record(path, event)
