"""Supervised fine-tuning of a distilled hybrid on traces, through TRL's SFTTrainer (Apriel-H1, H1-30-SFT).

The loss is cross-entropy on the data's own targets; no teacher takes part. TRL is given our packed rows as they are:
it must neither template nor tokenise nor pack again, or masks and document boundaries would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from distill.config import EngineConfig, TrainConfig
from distill.trainer import LanguageTrainer, fit, training_arguments


class PackedDataset(Dataset):
    """Our packed rows, as the class that TRL asks for: each is made when it is asked for, nothing is copied.

    Args:
        rows: a sized sequence of ``input_ids``, ``labels`` and ``position_ids``, each int64 [T].
    """

    def __init__(self, rows: Any) -> None:
        super().__init__(InMemoryTable.from_pydict({}))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return self.rows[key]

    def __getitems__(self, keys: list[int]) -> list[dict[str, torch.Tensor]]:
        return [self.rows[key] for key in keys]

    def __iter__(self) -> Any:
        return (self.rows[index] for index in range(len(self)))


class TraceTrainer(LanguageTrainer, SFTTrainer):
    """TRL's SFTTrainer with our parameter groups (what decays, and what does not).

    Its loss is divided by the valid targets of the global batch, and it forbids the cache, with which transformers
    would not see where packed documents begin.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card beside a checkpoint: the run's records say what was trained."""

    def _send_telemetry(self) -> None:
        """Nothing is reported to anyone."""


def sft_arguments(
    train: TrainConfig, steps: int, output: Path, seed: int, dtype: str = "float32", engine: EngineConfig | None = None
) -> TrlConfig:
    """Our config as TRL's SFTConfig, with every preparation of the data turned off."""
    return training_arguments(
        train, steps, output, seed, dtype, engine=engine,
        kind=TrlConfig, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
    )  # fmt: skip


def fine_tune(
    model: Any,
    tokenizer: Any,
    rows: Any,
    train: TrainConfig,
    steps: int,
    output: Path,
    *,
    seed: int,
    dtype: str = "float32",
    title: str = "SFT",
    log: Path | None = None,
) -> TraceTrainer:
    """Fine-tune ``model`` in place on ``steps`` global batches of packed rows, every parameter trained.

    Continues from the newest checkpoint in ``output``, to the same bits on the same number of CPU threads.

    Args:
        rows: at least ``steps * train.batch_size`` packed rows (``distill.data``).
        train: batch, learning rate, schedule and clipping; its ``loss`` is not looked at.
        output: where checkpoints go, every ``train.save_steps`` steps.
        log: JSONL file that gets a line a step.

    Raises UserError when the loss is not finite.
    """
    arguments = sft_arguments(train, steps, output, seed, dtype)
    return tune(model, tokenizer, rows, arguments, title=title, log=log)


def tune(
    model: Any,
    tokenizer: Any,
    rows: Any,
    arguments: TrlConfig,
    *,
    title: str,
    log: Path | None,
    prepared: Callable[[Any], None] | None = None,
) -> TraceTrainer:
    """``fine_tune`` by ``arguments`` that were made before the model was loaded, as engines with weights in parts want
    it; ``prepared`` is called before the first step."""
    trainer = fit(
        TraceTrainer,
        model.train(),
        PackedDataset(rows),
        arguments,
        title=title,
        log=log,
        key="sft",
        processing_class=tokenizer,
        prepared=prepared,
    )
    assert isinstance(trainer, TraceTrainer)
    model.__dict__.pop("forward", None)  # TRL left its own on this object
    return trainer
