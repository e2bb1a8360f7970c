"""Training on Hugging Face Trainer: one place that turns our config into its arguments, shows progress, and
computes the distillation loss inside the (possibly wrapped) student's forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from distill import distributed, interrupt, universal
from distill.checkpoints import checkpoints_of, newest_good, prune, seal
from distill.config import EngineConfig, TrainConfig
from distill.data.pack import IGNORE, collate
from distill.engine import arguments_of, check_shares
from distill.errors import UserError
from distill.groups import NO_DECAY, split_by_rate
from distill.guards import Guard, LogWhenSaving, RollBack, StopOnNonFinite
from distill.losses import distillation_loss
from distill.progress import ProgressCallback, StopWhenAsked
from distill.storage import building_place, new_folder
from distill.teacher import Teacher


class LanguageTrainer(Trainer):
    """Hugging Face Trainer with the parameter groups of our mixers, and checkpoints that are whole or not there;
    trains any causal LM on its own loss.

    Args:
        mixer_learning_rate: that of the parameters of replaced mixers (0: the same as all others).
        rates: learning rates of the groups of parameters that have their own (``distill.groups``).
        prepared: called once the model is as it will be trained (wrapped, in parts), before the first step.
    """

    def __init__(
        self,
        *args: Any,
        mixer_learning_rate: float = 0.0,
        rates: Mapping[str, float] | None = None,
        prepared: Callable[[Any], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rates = {**({"mixers": mixer_learning_rate} if mixer_learning_rate else {}), **(rates or {})}
        self.prepared = prepared
        self.decays: list[float] = []
        self.building: Path | None = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        result = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled and Path(str(resume_from_checkpoint)).name == universal.FOLDER:
            universal.repair(self, self.decays)
        if self.prepared is not None:
            self.prepared(self)
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.building or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others, seal and rename it; only then do older ones go.

        Raises DiskFull; what was half written is gone then, and the others stand.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        target, wait, first = folder / f"checkpoint-{step}", distributed.wait_for_all, self.args.should_save
        with distributed.unwatched(), new_folder(target) if first else nullcontext(building_place(target)) as partial:
            wait()
            self.building = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.building = None
            wait()  # each process of a job writes its random numbers, and its part of what is sharded
            if first:
                (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                seal(partial)
        if first:
            prune(folder, step, self.args.save_total_limit or 2)
        wait()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step + 1
        distributed.mark(f"step {step}, forward", watched=True)
        loss = super().training_step(*args, **kwargs)
        distributed.mark(f"step {step}, after backward")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Guard):
                callback.take(loss)
        return loss

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """The weights where they are in parts, brought together on the first process (every process has to ask);
        None where each process has them whole."""
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and zero3(self)):
            state = self.accelerator.get_state_dict(self.model_wrapped)
            tied = self.model.all_tied_weights_keys  # brought together, each is a tensor of its own
            return {name: tensor for name, tensor in state.items() if name not in tied} if state else {}
        return None

    def get_train_dataloader(self) -> Any:
        """The rows, prepared by processes that a signal to the whole job does not end."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # Accelerate wraps it
        inner.worker_init_fn = partial(interrupt.spare, inner.worker_init_fn)
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, parameters with a learning rate of their own in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.rates:
            split_by_rate(optimizer, self.model, self.rates)
        if fresh and not all(group["params"] for group in optimizer.param_groups):
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.decays = [float(group["weight_decay"]) for group in optimizer.param_groups] if fresh else self.decays
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that decay: all but those in ``NO_DECAY``."""
        return [name for name, _ in model.named_parameters() if not NO_DECAY.search(name)]


def engine_in(trainer: Trainer) -> str:
    """What a trainer shares its work by: ``deepspeed``, ``fsdp``, ``ddp`` or ``none``."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "deepspeed" if trainer.is_deepspeed_enabled else "fsdp"
    return "ddp" if trainer.args.world_size > 1 else "none"


def zero3(trainer: Trainer) -> bool:
    """Whether a training under DeepSpeed has its weights in parts."""
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    return bool(plugin.zero_stage == 3)


def training_arguments(
    train: TrainConfig,
    steps: int,
    output: Path,
    seed: int,
    dtype: str = "float32",
    *,
    engine: EngineConfig | None = None,
    kind: type[TrainingArguments] = TrainingArguments,
    **extra: Any,
) -> Any:
    """Our train config as Hugging Face TrainingArguments, or as the subclass ``kind`` with its ``extra`` fields.

    With an ``engine`` that has weights in parts, models that are loaded while the arguments live are loaded in parts.
    """
    world = distributed.world()
    check_shares(train, world)
    on_gpu = torch.cuda.is_available()
    micro = train.batch_size // train.gradient_accumulation // world
    arguments = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "warmup_steps": min(train.warmup_steps, steps),
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "adam_beta2": train.beta2,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "activation_checkpointing": train.gradient_checkpointing,
        "bf16": dtype == "bfloat16",
        "logging_steps": 1 if steps <= 2000 else 10,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if 0 < train.save_steps < steps else "no",
        "save_steps": max(train.save_steps, 1),
        "save_total_limit": train.keep_checkpoints,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": train.data_workers,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": not on_gpu,
        "ddp_find_unused_parameters": False,
    }
    arguments |= arguments_of(engine, train, dtype, world) if engine is not None else {}
    return kind(**{**arguments, **extra})


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
    train: TrainConfig | None = None,
    **extra: Any,
) -> LanguageTrainer:
    """Train, continuing from the newest checkpoint in the output folder if there is one.

    ``key`` is the part of the config that the run came from, for messages; ``train`` says what to do about bad losses;
    ``extra`` goes to the trainer. A signal to stop is heeded after a step and its checkpoint, the same on all
    processes; where there is no ``log``, at once: nothing of it is to be kept.

    Raises UserError when the loss is not finite or a checkpoint finds no room (those before it stay), Stopped after a
    signal.
    """
    length = rows[0]["input_ids"].shape[-1]
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    assert isinstance(rows, Sized) and len(rows) >= arguments.max_steps * rows_per_step, "too few rows"
    guarded = train is not None and log is not None and (train.on_bad_loss != "stop" or train.spike > 0)
    output = Path(str(arguments.output_dir))
    while True:
        watching: list[TrainerCallback] = [StopOnNonFinite(key)]
        if guarded and train is not None and log is not None:
            watching = [Guard(train.on_bad_loss, train.spike, log.with_name("guards.jsonl"), key)]
            watching += [StopOnNonFinite(key)] if train.on_bad_loss == "stop" else [LogWhenSaving()]
        progress = ProgressCallback(title, arguments.max_steps, rows_per_step * length, log)
        trainer = trainer_class(
            model=cast(Any, model),
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[progress, *watching, StopWhenAsked(), *callbacks],
            **extra,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        checkpoint = distributed.agreed(lambda: newest_good(output, lambda line: print(f"{title}: {line}", flush=True)))
        try:
            checkpoint = universal.resumable(checkpoint, model, arguments, engine_in(trainer))
            with interrupt.deferred() if log is not None else nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return trainer
        except RollBack:
            if not distributed.agreed(lambda: checkpoints_of(output)):
                raise UserError(
                    f"{key}.on_bad_loss=roll_back, and there is no checkpoint yet to go back to: lower "
                    f"{key}.save_steps, or set {key}.on_bad_loss=skip"
                ) from None
            trainer.accelerator.free_memory()
        finally:
            distributed.unwatch()
            if distributed.rank() == 0:
                universal.remove(output / universal.FOLDER)


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
        with getattr(self.teacher, "gathered", nullcontext)():
            output = model(**inputs, use_cache=False, objective=objective)
        distributed.mark(f"step {self.state.global_step + 1}, backward")
        loss = output.loss
        if num_items_in_batch is not None:  # ranks' gradients are averaged, the count is global
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss


@torch.no_grad()
def heldout_loss(
    model: Any, teacher: Teacher | None, rows: Any, batch_size: int, loss: str, temperature: float = 1.0
) -> float:
    """Mean loss in nats over the valid targets of fixed held-out rows (a sequence of packed rows), which the processes
    of a training under way share out.

    ``cross_entropy`` looks at no teacher and may go without.
    """
    assert teacher is not None or loss == "cross_entropy", loss
    total, count = 0.0, 0.0
    device = model.device
    training = model.training
    model.eval()
    world, rank = distributed.world(), distributed.rank()
    starts = range(0, len(rows), batch_size)
    for first in range(0, len(starts), world):
        start = starts[min(first + rank, len(starts) - 1)]
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        if first + rank >= len(starts):  # nothing is left for this process, but what is in parts takes all of them
            labels = torch.full_like(labels, IGNORE)
        options: Any = {"temperature": temperature, "count": 1.0}
        if teacher is None:
            objective = partial(_own_objective, loss, labels, **options)
        else:
            objective = partial(_objective, loss, teacher.hidden(inputs), teacher.head, labels, **options)
        with getattr(teacher, "gathered", nullcontext)():
            part = model(**inputs, use_cache=False, objective=objective).loss
        total += float(part)
        count += int((labels[:, 1:] != IGNORE).sum())
    model.train(training)
    total, count = distributed.summed(total, count)
    return total / max(count, 1)
