"""The system from Python: load, score, hybridize, train, package.

    model, tokenizer = distill.load("embedded")
    scores = distill.score(model, tokenizer)
    hybrid = distill.hybridize(model, scores.least(5), mixer="mamba2")
    distill.train(hybrid, model, tokenizer, steps=200)

What is given wrongly raises ``distill.errors.UserError`` before work is spent: what was given, what is allowed, what to
do.
"""

from __future__ import annotations

import operator
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill.config import DataConfig, MixerConfig, TrainConfig
from distill.config_merge import spread_options
from distill.data.sources import EMBEDDED
from distill.errors import UserError, brief, check_whole, choose
from distill.hub.package import package
from distill.hybrid import surgery
from distill.hybrid.config import mixer_options
from distill.init import available as initialisations
from distill.mixers import ATTENTION, check_used
from distill.mixers import available as mixers
from distill.placement import hybrid_name, parse_name, replace, replaced_blocks
from distill.posttrain.merge import checkpoint_folder
from distill.scoring import FIXED, Scores, check_tokenizer, frozen, score, training_rows
from distill.teacher import DTYPES, Teacher, load_model, load_tokenizer
from distill.trainer import DistillTrainer, fit, heldout_loss, training_arguments

__all__ = ["Loaded", "Scores", "hybridize", "load", "package", "score", "train"]

Placement = Sequence[int] | Mapping[int, str] | Sequence[str] | str


class Loaded(NamedTuple):
    """What ``load`` gives: ``model, tokenizer = distill.load(path)``."""

    model: Any
    tokenizer: Any


def load(path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device | None = None) -> Loaded:
    """A model and its tokenizer, checked before the weights are read, in eval mode.

    Args:
        path: ``embedded`` (the teacher that comes along), a folder with config.json, a stage's folder
            (``runs/demo/stages/01-H1-5``), or a hub name. A hybrid, or a transformer of a supported family.
        dtype: float32 or bfloat16.
        device: by default the GPU if there is one.

    Returns:
        A transformers causal LM (``model(ids [B, T]).logits [B, T, V]``, ``model.generate``) and its tokenizer.

    Raises UserError for what is not there, is damaged, or cannot be loaded.
    """
    kind = choose("dtype", str(dtype).removeprefix("torch."), DTYPES)
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a name and for hardware that is not
            raise UserError(f"device={device!r} cannot be used here: {brief(error)}") from error
    name = str(path)
    if name.strip() and name != EMBEDDED and Path(name).expanduser().is_dir():
        name = str(checkpoint_folder(name))
    model = load_model(name, kind)
    return Loaded(model if device is None else model.to(device), load_tokenizer(name))


def hybridize(
    model: Any,
    placement: Placement,
    mixer: str = "mamba1",
    init: str = "mil",
    *,
    scores: Scores | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A hybrid of ``model``: the blocks that ``placement`` names get another mixer, which starts from their attention.

    Args:
        model: a transformer of a supported family, or a hybrid with fewer blocks replaced; or what ``load`` takes. It
            is left as it is.
        placement: the blocks to replace (``[3, 6, 7]``), or the mixer of some (``{3: "mamba1", 6: "mamba2"}``) or of
            all (``["attention", "mamba2", ...]``), or how many in all (``"H1-5/10"``), where ``scores`` say which.
        mixer: what takes the place of attention where the placement does not say: ``mamba1`` or ``mamba2``.
        init: ``mil`` (from the attention's own projections) or ``fresh`` (random); ``aligned`` takes data, and is for
            runs (``mixer.init``).
        scores: what ``score`` gave.
        seed: of what starts at random.
        options: of the mixer, as in ``distill.config.MixerConfig``: d_state, d_conv, mil_layout, z_init, conv_init,
            bc_norm. Of a hybrid those that it has are the defaults.

    Returns:
        A transformers causal LM on the model's device and in its dtype, whose config names its mixers; all that was not
        replaced has the model's weights bit for bit.

    Raises UserError for an architecture, a placement, a mixer or options that cannot be.
    """
    start = MixerConfig(name=choose("mixer", mixer, mixers()), init=choose("init", init, initialisations()))
    if init == "aligned":
        raise UserError(
            "init='aligned' regresses mixers on data, and hybridize has none: set mixer.init=aligned in the config of "
            "a run, or take 'mil' or 'fresh'"
        )
    if isinstance(model, (str, Path)):
        model = load(model).model
    surgery.check_model(model)
    surgery.check_convertible(model.config)
    before = list(getattr(model.config, "mixers", None) or [ATTENTION] * model.config.num_hidden_layers)
    if replaced_blocks(before):
        there = model.config.mixer_config
        start = replace_fields(start, **{**there, "bc_norm": "always" if there["bc_norm"] else "never"})
    (settings,) = spread_options(options, start, fixed=("name", "init", "blocks"))
    after = mixers_of(before, placement, mixer, scores)
    check_used(after, mixer_options(settings))
    return surgery.hybridize(model, after, settings, seed=check_whole("seed", seed))


def mixers_of(before: Sequence[str], placement: Placement, mixer: str, scores: Scores | None = None) -> list[str]:
    """The mixer of every block after a ``placement``, in any of its forms, on a model that has the mixers ``before``.

    Raises UserError for a placement that does not fit.
    """
    if isinstance(placement, str):
        return replace(before, _counted(before, placement, scores), mixer)
    if isinstance(placement, Mapping):
        chosen = {
            _block(block): choose(f"mixer of block {block}:", name, mixers()) for block, name in placement.items()
        }
        after = list(before)
        for block, name in chosen.items():
            after = replace(after, [block], name)
        return after
    if not isinstance(placement, Iterable):
        raise UserError(f"placement={placement!r}: give a list of blocks, such as [3, 6, 7]")
    entries = list(placement)
    if entries and all(isinstance(entry, str) for entry in entries):
        if len(entries) != len(before):
            raise UserError(
                f"placement has {len(entries)} mixers for {len(before)} blocks; name the mixer of every one"
            )
        return [
            choose(f"mixer of block {block}:", str(name), (ATTENTION, *mixers())) for block, name in enumerate(entries)
        ]
    return replace(before, [_block(entry) for entry in entries], mixer)


def _counted(before: Sequence[str], name: str, scores: Scores | None) -> list[int]:
    """The blocks to replace for there to be as many as ``name`` says, by ``scores``."""
    wanted, blocks = parse_name(name)
    if blocks not in (None, len(before)):
        raise UserError(f"placement='{name}' is of a model with {blocks} blocks, this one has {len(before)}")
    there = len(replaced_blocks(before))
    if scores is None:
        raise UserError(
            f"placement='{name}' says how many blocks, not which: give scores=distill.score(model, tokenizer), or the "
            "blocks themselves, such as [3, 6, 7]"
        )
    if not isinstance(scores, Scores):
        raise UserError(f"scores is a {type(scores).__name__}: give what distill.score gave")
    if wanted < there:
        raise UserError(f"placement='{name}', but the model is {hybrid_name(there, len(before))} already")
    return scores.least(wanted - there)


def _block(value: Any) -> int:
    """A block's index; UserError for what is none."""
    whole: Any = None if isinstance(value, bool) else value
    try:
        return operator.index(whole)
    except TypeError:
        raise UserError(
            f"placement has {value!r}, which is no block: give blocks ([3, 6, 7]), their mixers ({{3: 'mamba2'}}), the "
            "mixer of every block, or a name such as 'H1-5/10' with scores"
        ) from None


def train(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    *,
    data: str | Path = EMBEDDED,
    steps: int = 100,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Distil ``student`` from the frozen ``teacher`` in place, every weight, and leave it in eval mode.

    For a long training take ``distill train``, which writes checkpoints and goes on from them.

    Args:
        student: a hybrid with float32 weights; teacher: the transformer that it was made from.
        data: what to train on, as ``data.source`` of a config: ``embedded``, a file or folder, or a hub name.
        steps: optimizer steps of ``batch_size`` packed rows of ``sequence_length`` tokens.
        options: of the training and the data, as in ``distill.config`` (TrainConfig, DataConfig): loss, learning_rate,
            batch_size, gradient_accumulation, warmup_steps, sequence_length, mask, ...

    Returns:
        eval_loss_start and eval_loss_end (nats a target on held-out rows), tokens, minutes.

    Raises UserError for data or options that cannot be, and where the loss is not finite.
    """
    settings, rows = spread_options(options, TrainConfig(), DataConfig(), fixed=(*FIXED, "steps"))
    surgery.check_model(student, "student")
    surgery.check_model(teacher, "teacher")
    check_tokenizer(tokenizer)
    if not surgery.is_hybrid(student.config):
        raise UserError(f"student is a {student.config.model_type}, no hybrid: train(student, teacher, tokenizer)")
    if student.config.vocab_size != teacher.config.vocab_size:
        sizes = f"{student.config.vocab_size} and {teacher.config.vocab_size}"
        raise UserError(f"student and teacher have vocabularies of {sizes} tokens: they must be the same")
    training, heldout = training_rows(student, tokenizer, data, rows, settings, steps, seed, settings.eval_rows)
    judge, cached, began = Teacher(teacher), student.config.use_cache, time.monotonic()

    def loss() -> float:
        return heldout_loss(student, judge, heldout, settings.batch_size, settings.loss, settings.temperature)

    with frozen(teacher), tempfile.TemporaryDirectory() as scratch:
        dtype = str(teacher.dtype).removeprefix("torch.")
        arguments = training_arguments(settings, steps, Path(scratch), seed, dtype)
        start = loss()
        try:
            fit(
                DistillTrainer,
                student.requires_grad_(True).train(),
                training,
                arguments,
                title="train",
                log=None,
                teacher=judge,
                loss=settings.loss,
                temperature=settings.temperature,
                mixer_learning_rate=settings.mixer_learning_rate,
            )
        finally:
            student.eval()
            student.config.use_cache = cached
        tokens = steps * settings.batch_size * rows.sequence_length
        minutes = (time.monotonic() - began) / 60
        return {"eval_loss_start": start, "eval_loss_end": loss(), "tokens": tokens, "minutes": minutes}
