"""Importance scores of a model at hand: how much each block matters, as a table and as an order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.config import AlignedConfig, DataConfig, LooConfig, MixerConfig, MmrConfig, ScoreConfig, TrainConfig
from distill.config_merge import spread_options
from distill.data import suite
from distill.data.jsonl import iterate_rows
from distill.data.mixture import check_data, load_data
from distill.data.sources import EMBEDDED
from distill.errors import UserError, check_whole, choose
from distill.hybrid.surgery import check_convertible, check_model
from distill.importance import COMBINED, Metric, Setup, available, needs, scorer
from distill.importance.checks import check_rows
from distill.importance.mmr import TRAINABLE
from distill.likelihood import check_question, requests_of
from distill.losses import terms_of
from distill.mixers import ATTENTION
from distill.mixers import available as mixers
from distill.placement import replaced_blocks
from distill.teacher import RememberingTeacher

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT_SEED = 90_001  # validation rows: the same for every training and every candidate
FIXED = ("mixture", "steps_by_stage", "keep_steps", "save_steps", "source", "teacher_mode", "teacher_top_k")
"""Keys of the config that have no meaning for one training."""
OF_RUNS = {COMBINED, "given", "recall_drop"}
"""Scores whose options only a run's config has."""
ABOVE_0 = ("steps", "held-out rows", "batch_size", "gradient_accumulation", "learning_rate", "temperature")
"""Numbers of a training that must be above 0; the others may be 0."""


@dataclass(frozen=True)
class Scores:
    """How much each block matters: what it costs to replace it."""

    method: str
    """``loo`` (accuracy lost without the block) or ``mmr`` (loss after a short distillation with it swapped)."""
    order: Sequence[int]
    """The blocks, the least important first."""
    record: Mapping[str, Any]
    """All that was measured, as in the ``scores.json`` of a run."""

    def least(self, count: int) -> list[int]:
        """The ``count`` least important blocks, ascending; UserError where fewer were scored."""
        if not 0 <= count <= len(self.order):
            raise UserError(f"cannot take {count} blocks: {len(self.order)} were scored")
        return sorted(self.order[:count])

    @property
    def table(self) -> pd.DataFrame:
        """A row a block, the least important first: block, importance, and what went into it (loo: stderr, value,
        loglikelihood; mmr: loss_start, loss_end)."""
        import pandas as pd

        frame = pd.DataFrame(list(self.record["blocks"])).rename(columns={"score": "importance"})
        return frame.set_index("block").loc[list(self.order)].reset_index()

    def __str__(self) -> str:
        return f"{self.method}, the least important first\n{self.table.to_string(index=False)}"


def score(
    model: Any,
    tokenizer: Any,
    *,
    method: str = "loo",
    data: str | Path | Sequence[Mapping[str, Any]] = EMBEDDED,
    questions: int | None = None,
    metric: Metric | None = None,
    teacher: Any = None,
    steps: int | None = None,
    seed: int = 0,
    report: Callable[[int, dict[str, float]], None] = lambda block, row: None,
    **options: Any,
) -> Scores:
    """Score the importance of every block that still has attention. The model is left as it is.

    Args:
        model, tokenizer: a transformer or a hybrid, as ``distill.load`` gives them.
        method: ``loo``: accuracy lost when a block is the identity (Apriel-H1's first stage); ``mmr``: loss after a
            short distillation with the block swapped (its later stages); others: docs/importance.md.
        data: for loo multiple-choice questions: ``embedded``, a JSONL file, or rows, each with ``prompt``, ``choices``
            and ``gold`` (the right choice, from 0). For mmr what to train on, as ``data.source`` of a config.
        questions: how many of them are asked (loo; by default 500; 0: all).
        metric: for loo, in place of data: ``metric(model, variants)``, such as
            ``eval.loglikelihood.prepare("mmlu", tokenizer, model, 1000).compare``.
        teacher: for mmr, the model to distil from; by default the model itself, if it is no hybrid.
        steps: for mmr, training steps a block (by default 100).
        seed: of the data and of what starts at random (mmr).
        report: called with (block, row) as each is done.
        options: for mmr, of the mixer, the training and the data (MmrConfig, TrainConfig, DataConfig and MixerConfig in
            ``distill.config``): mixer, init, learning_rate, batch_size, sequence_length, heldout_tokens, ...

    Returns:
        The scores: ``scores.least(5)`` are blocks to replace, ``scores.table`` is a frame, ``print(scores)`` shows it.

    Raises UserError for a method, data or options that cannot be.
    """
    choose("method", method, set(available()) - OF_RUNS)
    read = needs(ScoreConfig(), method)
    foreign = {} if "rows" in read else {"teacher": teacher, "steps": steps}
    foreign |= {} if "metric" in read else {"questions": questions, "metric": metric}
    if given := [name for name, value in foreign.items() if value is not None]:
        raise UserError(f"{method} takes no '{given[0]}', which is of another method: leave it out")
    check_model(model)
    check_tokenizer(tokenizer)
    questions = 500 if questions is None else questions
    steps, seed = 100 if steps is None else steps, check_whole("seed", seed)
    if teacher is not None:
        check_model(teacher, "teacher")
    check_convertible(model.config)
    placed = list(getattr(model.config, "mixers", None) or [ATTENTION] * model.config.num_hidden_layers)
    mmr, train, rows, mixer = _options(method, options, steps if "rows" in read else None)
    training: Any = None
    heldout: Any = None
    if "rows" in read:
        if teacher is None and replaced_blocks(placed):
            raise UserError(f"the model is a hybrid, and {method} distils it from its teacher: give teacher=")
        count = -(-mmr.heldout_tokens // rows.sequence_length)
        training, heldout = training_rows(model, tokenizer, data, rows, train, steps, seed, count)
    if "metric" in read and metric is None:
        metric = requests_of(_questions(data, questions), tokenizer).compare
    with frozen(model), frozen(teacher or model), tempfile.TemporaryDirectory() as scratch:
        setup = Setup(
            model=model,
            teacher=RememberingTeacher(teacher or model),
            blocks=[block for block, kind in enumerate(placed) if kind == ATTENTION],
            metric=metric,  # type: ignore[arg-type]
            rows=training,
            heldout=heldout,
            config=ScoreConfig(
                loo=LooConfig(task="questions", questions=questions),
                mmr=mmr,
                aligned=AlignedConfig(steps=mmr.steps, heldout_tokens=mmr.heldout_tokens),
            ),
            train=train,
            mixer=mixer,
            seed=seed,
            kernels="auto",
            dtype=str((teacher or model).dtype).removeprefix("torch."),
            scratch=Path(scratch),
            report=report,
            added=len(placed) if method == "greedy" else 1,  # every round, for any number of blocks may be wanted
        )
        record = scorer(method)(setup)
        check_rows(method, record["blocks"])
    return Scores(method, record["order"], record)


def _options(
    method: str, options: dict[str, Any], steps: int | None
) -> tuple[MmrConfig, TrainConfig, DataConfig, MixerConfig]:
    """The keyword arguments of ``score`` as the parts of a config that they belong to."""
    if steps is None and options:
        hint = ": data, questions and metric say what it measures" if method == "loo" else ""
        raise UserError(f"{method} takes no option '{next(iter(options))}'{hint}")
    name = choose("mixer", options.pop("mixer", MixerConfig().name), mixers())
    parts = (MmrConfig(), TrainConfig(), DataConfig(), MixerConfig(name=name))
    given = {} if steps is None else {**options, "steps": steps}
    mmr, train, rows, mixer = spread_options(given, *parts, fixed=(*FIXED, "name"))
    choose("trainable", mmr.trainable, TRAINABLE)
    return mmr, train, rows, mixer


def _questions(data: Any, count: int) -> list[Mapping[str, Any]]:
    """The first ``count`` (0: all) multiple-choice questions of what ``data`` names."""
    check_whole("questions", count)
    if not isinstance(data, (str, Path, Sequence)):
        raise UserError(f"data is a {type(data).__name__}: loo wants '{EMBEDDED}', a JSONL file, or rows")
    if isinstance(data, (str, Path)) and str(data) != EMBEDDED:
        path = Path(data).expanduser()
        if not path.is_file():
            raise UserError(f"no file {path}: loo wants '{EMBEDDED}', a JSONL file, or rows, each a question")
        found: Any = (row for _, row in iterate_rows(path, lambda row: (check_question(row), row)[1]))
    else:
        found = suite.choice() if isinstance(data, str) else data
    return list(islice(found, count or None))


def training_rows(
    model: Any, tokenizer: Any, data: Any, rows: DataConfig, train: TrainConfig, steps: int, seed: int, heldout: int
) -> tuple[Any, Any]:
    """Packed rows to train ``steps`` steps on, and ``heldout`` rows that are not among them.

    Raises UserError for a training that could not be.
    """
    if not isinstance(data, (str, Path)):
        raise UserError(f"data={type(data).__name__}: training wants '{EMBEDDED}', a file or folder, or a hub name")
    check_whole("seed", seed)
    check_whole("steps", steps)
    for key, value in {**asdict(train), "steps": steps, "held-out rows": heldout}.items():
        if isinstance(value, (int, float)) and not (value > 0 if key in ABOVE_0 else value >= 0):
            raise UserError(f"{key}={value} must be {'above 0' if key in ABOVE_0 else 'at least 0'}")
    terms_of(train.loss)
    if model.dtype != torch.float32:
        raise UserError(f"float32 weights are trained, the model has {model.dtype}: load it with dtype='float32'")
    rows.source = str(data)
    check_data(rows, lambda: tokenizer, "data")
    if rows.source == EMBEDDED and tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template, which the embedded traces need: give other data")
    training = load_data(rows, tokenizer, steps * train.batch_size, seed)
    return training, load_data(rows, tokenizer, heldout, HELD_OUT_SEED, held_out=True)


def check_tokenizer(tokenizer: Any) -> None:
    """UserError for what is no tokenizer of transformers."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer is a {type(tokenizer).__name__}: give that of the model, as distill.load gives it")


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within, the model is in eval mode and has no gradients; after it is as it was."""
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter, value in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(value)
