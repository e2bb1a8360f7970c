"""What distilling and fine-tuning share where several processes train: held-out losses, and models that the first of
them writes whole, whatever parts the processes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from distill import distributed
from distill.engine import engine_of, wrapped_by
from distill.records import read_json, write_json
from distill.storage import new_folder
from distill.trainer import LanguageTrainer, engine_in
from stages.common import say
from stages.context import Context

START = "start.json"
"""The held-out loss before the first step, of a training that is not over."""


def tell(line: str) -> None:
    """Print a line of progress, once for all processes."""
    if distributed.rank() == 0:
        say(line)


class Training:
    """A training of one model, by this process alone or by all of a job.

    Args:
        model: what is trained, and later (``trainer``) wrapped by its engine.
        loss_of: the held-out loss of a model, in batches of so many rows.
        batch_size: rows a batch, where one process takes the loss of a model that nothing wraps.
        start: what the held-out loss was before the first step is kept there while the training is under way.
    """

    def __init__(self, model: Any, loss_of: Callable[[Any, int], float], batch_size: int, start: Path) -> None:
        self.model, self.loss_of, self.batch_size, self.start = model, loss_of, batch_size, start
        self.trainer: LanguageTrainer | None = None

    def heldout_loss(self) -> float:
        """The held-out loss of the model as it is now, the same on every process."""
        if self.trainer is None or engine_in(self.trainer) == "none":
            return self.loss_of(self.model, self.batch_size)
        with distributed.unwatched():
            return self.loss_of(self.trainer.model_wrapped, self.trainer.args.per_device_eval_batch_size)

    def first_loss(self, trainer: LanguageTrainer, context: Context) -> float:
        """The held-out loss before the first step, once the model is as it will be trained; also after a resumption."""
        self.trainer = trainer
        wanted, found = engine_of(context.config.engine, distributed.world()), wrapped_by(trainer.model_wrapped)
        if found != wanted:
            raise RuntimeError(f"engine {wanted} was asked for, and the model is wrapped by {found}")
        loss = distributed.agreed(lambda: read_json(self.start) if self.start.is_file() else None)
        if loss is None:
            loss = self.heldout_loss()
            if distributed.rank() == 0:
                write_json(self.start, loss)
        return float(loss)

    def save(self, target: Path, tokenizer: Any, lineage: Sequence[Any]) -> None:
        """Write the model as it is now, with its tokenizer and what it comes from; every process has to ask."""
        assert self.trainer is not None
        state = self.trainer.whole_state()
        with new_folder(target) if distributed.rank() == 0 else nullcontext() as partial:
            if partial is not None:
                cache, self.model.config.use_cache = self.model.config.use_cache, True
                self.model.save_pretrained(partial, **({"state_dict": state} if state is not None else {}))
                self.model.config.use_cache = cache
                tokenizer.save_pretrained(partial)
                if lineage:
                    write_json(partial / "lineage.json", lineage)
        distributed.wait_for_all()


def processes(context: Context) -> dict[str, Any]:
    """What shared a training, for its record; nothing where one process did it all."""
    world = distributed.world()
    engine = engine_of(context.config.engine, world)
    return {"engine": engine, "processes": world} if engine != "none" and distributed.job() is not None else {}
