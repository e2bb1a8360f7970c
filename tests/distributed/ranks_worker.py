"""One rank of the trainings that test_one_rank.py looks at: what one rank alone meets, and streamed rows.

Usage: python -m distill.launch --nproc-per-node 2 ranks_worker.py FOLDER, where FOLDER has ``teacher``, ``student`` and
``data.jsonl``; every rank writes ``NAME-RANK.pt`` of each training: the weights, the rows it saw, what was said.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import distill  # noqa: F401  registers the hybrids
from distill import distributed
from distill.config import DataConfig, EngineConfig, TrainConfig
from distill.data.mixture import load_data
from distill.data.tokenizer import build_tokenizer
from distill.engine import sharing
from distill.errors import UserError
from distill.posttrain.sft import sft_arguments, tune
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments

STEPS, BATCH, LENGTH = 14, 4, 32
NAN = float("nan")
BAD: dict[str, dict[str, Any]] = {
    "nan_skip": {"at": 5, "by": NAN, "on_bad_loss": "skip"},
    "spike_skip": {"at": 13, "by": 1000.0, "on_bad_loss": "skip", "spike": 5.0},
    "nan_roll_back": {"at": 6, "by": NAN, "on_bad_loss": "roll_back", "save_steps": 4},
    "spike_stop": {"at": 12, "by": 1000.0, "spike": 5.0, "save_steps": 5},
    "nan_stop": {"at": 3, "by": NAN},
}
"""Name -> the step whose loss is multiplied on the last rank, as a broken row of its share would do, and the policy."""
WORKERS = (0, 1, 2)


class Killed(Exception):
    """In place of a kill: nothing is written any more."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def trainer_of(seen: list[tuple[int, torch.Tensor]], at: int = 0, by: float = 1.0) -> type[DistillTrainer]:
    """A trainer that notes (step, tokens) of what it trains on, its loss multiplied ``by`` at step ``at`` on the last
    rank alone."""

    class Watched(DistillTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step + 1
            seen.append((step, inputs["input_ids"].clone()))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * by if step == at and distributed.rank() == distributed.world() - 1 else loss

    return Watched


def train(
    folder: Path, name: str, data: DataConfig, *, at: int = 0, by: float = 1.0, kill: int = 0, **keys: Any
) -> Any:
    """One training to its end, or to where it stops: the weights, the rows seen, and what was said."""
    usual = {"batch_size": BATCH, "learning_rate": 2e-3, "warmup_steps": 2, "gradient_accumulation": 2}
    options = TrainConfig(**{**usual, **keys})
    place, said = folder / name, ""
    if distributed.rank() == 0:
        place.mkdir(exist_ok=True)
    distributed.wait_for_all()
    arguments = training_arguments(options, STEPS, place / "checkpoints", seed=0, engine=EngineConfig())
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / part) for part in ("teacher", "student"))
    seen: list[tuple[int, torch.Tensor]] = []
    try:
        fit(
            trainer_of(seen, at, by), student.train(), load_data(data, build_tokenizer(), STEPS * BATCH, 0), arguments,
            title=name, log=place / "log.jsonl", train=options, callbacks=[KillAt(kill)], teacher=Teacher(teacher),
            loss="reverse_kl", temperature=1.0,
        )  # fmt: skip
    except (UserError, Killed) as error:
        said = str(error)
    return {"weights": student.state_dict(), "seen": seen, "said": said}


def fine_tune(folder: Path, name: str, data: DataConfig) -> Any:
    """One fine-tuning through TRL: the weights it ended with."""
    options = TrainConfig(batch_size=BATCH, gradient_accumulation=2, learning_rate=2e-3, warmup_steps=2, save_steps=2)
    arguments = sft_arguments(options, 5, folder / name / "checkpoints", 0, engine=EngineConfig())
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = build_tokenizer()
    tune(student, tokenizer, load_data(data, tokenizer, 5 * BATCH, 0), arguments, title=name, log=None)
    return {"weights": student.state_dict()}


def every_training(folder: Path) -> None:
    """All of them, one after the other, and what each ended with beside it."""
    streamed = DataConfig(source=str(folder / "data.jsonl"), sequence_length=LENGTH, streaming=True, shuffle_buffer=8)
    embedded = DataConfig(sequence_length=LENGTH, mix={"mod": 1.0, "add": 1.0})
    found = {name: train(folder, name, embedded, **keys) for name, keys in BAD.items()}
    for workers in WORKERS:
        keys = {"data_workers": workers, "save_steps": 4, "keep_checkpoints": workers + 1}
        found[f"workers_{workers}"] = train(folder, f"workers_{workers}", streamed, **keys)
    keys = {"data_workers": 1, "save_steps": 4}
    found["killed"] = train(folder, "killed", streamed, kill=7, **keys)
    found["resumed"] = train(folder, "killed", streamed, **keys)
    found["tuned"] = fine_tune(folder, "tuned", embedded)
    for name, result in found.items():
        torch.save(result, folder / f"{name}-{distributed.rank()}.pt")


def main() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    job = distributed.join()
    with sharing(EngineConfig()):
        every_training(Path(sys.argv[1]))
    if job.rank == 0:
        job.end(0)
    job.leave()


if __name__ == "__main__":
    main()
