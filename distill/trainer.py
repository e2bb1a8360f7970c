"""Training on Hugging Face Trainer: one place that turns our config into its arguments, shows progress, and
computes the distillation loss inside the (possibly wrapped) student's forward."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from distill import interrupt, tracking
from distill.checkpoints import checkpoints_of, newest_good, prune, seal
from distill.config import TrainConfig
from distill.data.pack import IGNORE, collate
from distill.errors import UserError
from distill.losses import distillation_loss
from distill.records import write_text
from distill.storage import building_place, new_folder, sync
from distill.teacher import Teacher

NO_DECAY = re.compile(r"A_log|\.D$|dt_bias|bias|norm|embed_tokens|lm_head")
"""A parameter whose name matches gets no weight decay."""


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
    """Calls ``keep(step)`` when each of ``steps`` is done, before Trainer's own checkpoint of that step: what a
    resumed run finds before its checkpoint has been kept."""

    def __init__(self, steps: Collection[int], keep: Callable[[int], None]) -> None:
        self.steps, self.keep = steps, keep

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps and state.is_world_process_zero:
            self.keep(state.global_step)


class StopWhenAsked(TrainerCallback):
    """Ends a training after the step in which a signal asked for it, with a checkpoint of that step."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if interrupt.asked():
            control.should_save = control.should_training_stop = True


def append_line(path: Path, event: dict[str, Any]) -> None:
    """Append one JSON line; those who follow the run get it, too."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    tracking.record(path, event)


class LanguageTrainer(Trainer):
    """Hugging Face Trainer with the parameter groups of our mixers, and checkpoints that are whole or not there;
    trains any causal LM on its own loss.

    Args:
        mixer_learning_rate: learning rate of the parameters of replaced mixers (0: the same as all others).
    """

    def __init__(self, *args: Any, mixer_learning_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixer_learning_rate = mixer_learning_rate
        self.building: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.building or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others, seal and rename it; only then do older ones go.

        Raises DiskFull; what was half written is gone then, and the others stand.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        target, wait, first = folder / f"checkpoint-{step}", self.accelerator.wait_for_everyone, self.args.should_save
        with new_folder(target) if first else nullcontext(building_place(target)) as partial:
            wait()
            self.building = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.building = None
            wait()  # each process of a job writes its random numbers
            if first:
                (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                seal(partial)
        if first:
            prune(folder, step, self.args.save_total_limit or 2)
        wait()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, the replaced mixers' parameters in groups of their own if they have their own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.mixer_learning_rate:
            ours = {id(p) for m in self.model.modules() if hasattr(m, "mil_slots") for p in m.parameters()}
            for group in list(optimizer.param_groups):
                mixers = [p for p in group["params"] if id(p) in ours]
                group["params"] = [p for p in group["params"] if id(p) not in ours]
                optimizer.add_param_group({**group, "params": mixers, "lr": self.mixer_learning_rate})
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that decay: all but those in ``NO_DECAY``."""
        return [name for name, _ in model.named_parameters() if not NO_DECAY.search(name)]


def training_arguments(
    train: TrainConfig,
    steps: int,
    output: Path,
    seed: int,
    dtype: str = "float32",
    *,
    kind: type[TrainingArguments] = TrainingArguments,
    **extra: Any,
) -> Any:
    """Our train config as Hugging Face TrainingArguments, or as the subclass ``kind`` with its ``extra`` fields."""
    if train.batch_size % train.gradient_accumulation:
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by "
            f"train.gradient_accumulation={train.gradient_accumulation}"
        )
    on_gpu = torch.cuda.is_available()
    return kind(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=train.batch_size // train.gradient_accumulation,
        per_device_eval_batch_size=train.batch_size // train.gradient_accumulation,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        warmup_steps=min(train.warmup_steps, steps),
        lr_scheduler_type="linear",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        adam_beta2=train.beta2,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        bf16=dtype == "bfloat16",
        logging_steps=1 if steps <= 2000 else 10,
        logging_nan_inf_filter=False,
        save_strategy="steps" if 0 < train.save_steps < steps else "no",
        save_steps=max(train.save_steps, 1),
        save_total_limit=2,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        use_cpu=not on_gpu,
        **extra,
    )


def fit(
    trainer_class: type[LanguageTrainer],
    model: torch.nn.Module,
    rows: Dataset[Any],
    arguments: TrainingArguments,
    *,
    title: str,
    log: Path | None,
    callbacks: Sequence[TrainerCallback] = (),
    key: str = "train",
    **extra: Any,
) -> LanguageTrainer:
    """Train, continuing from the newest checkpoint in the output folder if there is one.

    ``key`` is the part of the config that the run came from, for messages; ``extra`` goes to the trainer. A signal to
    stop is heeded after a step and its checkpoint; where there is no ``log``, at once: nothing of it is to be kept.

    Raises UserError when the loss is not finite or a checkpoint finds no room (those before it stay), Stopped after a
    signal.
    """
    length = rows[0]["input_ids"].shape[-1]
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    progress = ProgressCallback(title, arguments.max_steps, rows_per_step * length, log)
    trainer = trainer_class(
        model=cast(Any, model),
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[progress, StopOnNonFinite(key), StopWhenAsked(), *callbacks],
        **extra,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    assert isinstance(rows, Sized) and len(rows) >= arguments.max_steps * rows_per_step, "too few rows"
    checkpoint = newest_good(Path(str(arguments.output_dir)), lambda line: print(f"{title}: {line}", flush=True))
    with interrupt.deferred() if log is not None else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


class StopOnNonFinite(TrainerCallback):
    """Stop at the first loss or gradient that is NaN or infinite, naming the step, its rows of the data, and what to
    change (``key``: train or sft). A checkpoint is written only after this look at its step."""

    def __init__(self, key: str = "train") -> None:
        self.key = key

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        found = {name: logs[name] for name in ("loss", "grad_norm") if logs and logs.get(name) is not None}
        if all(torch.isfinite(torch.tensor(value)) for value in found.values()):
            return
        what = "loss" if not torch.isfinite(torch.tensor(found.get("loss", 0.0))) else "grad_norm"
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        last = next(iter(checkpoints_of(Path(str(args.output_dir))).values()), None)
        raise UserError(
            f"the {what} became {found[what]} at step {state.global_step}: lower {self.key}.learning_rate or raise "
            f"{self.key}.warmup_steps, or look at the step's data (rows {(state.global_step - 1) * rows} to "
            f"{state.global_step * rows - 1}, from 0)\n"
            f"checkpoints written before are kept{f', the last is {last}' if last else ' (there are none yet)'}"
        )


def _objective(
    loss: str,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.nn.Module,
    labels: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.nn.Module,
    *,
    temperature: float,
    count: Any,
    progress: float = 1.0,
) -> torch.Tensor:
    """``distillation_loss`` with its arguments in the order that a partial wants."""
    return distillation_loss(
        loss, hidden, head, teacher_hidden, teacher_head, labels,
        temperature=temperature, count=count, progress=progress,
    )  # fmt: skip


def _own_objective(
    loss: str, labels: torch.Tensor, hidden: torch.Tensor, head: torch.nn.Module, **options: Any
) -> torch.Tensor:
    """``distillation_loss`` of a loss that looks at no teacher."""
    return distillation_loss(loss, hidden, head, hidden, head, labels, **options)


class DistillTrainer(LanguageTrainer):
    """Distils a hybrid from a frozen teacher: the loss is taken inside the student's forward, over the valid
    targets of the global batch (all ranks, all accumulation steps)."""

    def __init__(self, *args: Any, teacher: Teacher, loss: str, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.loss, self.temperature = teacher, loss, temperature
        self.loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        objective = partial(
            _objective, self.loss, self.teacher.hidden(inputs), self.teacher.head, labels,
            temperature=self.temperature, count=num_items_in_batch,
            progress=self.state.global_step / max(self.state.max_steps - 1, 1),
        )  # fmt: skip
        output = model(**inputs, use_cache=False, objective=objective)
        loss = output.loss
        if num_items_in_batch is not None:  # ranks' gradients are averaged, the count is global
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss


@torch.no_grad()
def heldout_loss(
    model: Any, teacher: Teacher | None, rows: Any, batch_size: int, loss: str, temperature: float = 1.0
) -> float:
    """Mean loss in nats over the valid targets of fixed held-out rows (a sequence of packed rows).

    ``cross_entropy`` looks at no teacher and may go without.
    """
    assert teacher is not None or loss == "cross_entropy", loss
    total, count = 0.0, 0
    device = model.device
    training = model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        options: Any = {"temperature": temperature, "count": 1.0}
        if teacher is None:
            objective = partial(_own_objective, loss, labels, **options)
        else:
            objective = partial(_objective, loss, teacher.hidden(inputs), teacher.head, labels, **options)
        part = model(**inputs, use_cache=False, objective=objective).loss
        total += float(part)
        count += int((labels[:, 1:] != IGNORE).sum())
    model.train(training)
    return total / max(count, 1)
