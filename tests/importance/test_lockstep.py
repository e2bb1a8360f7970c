"""MMR in lockstep: the rows of separate trainings, from one pass of the teacher, without copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from distill.config import MixerConfig, MmrConfig, ScoreConfig, TrainConfig
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.importance import Setup, lockstep, mmr
from distill.importance.comparison import spearman
from distill.teacher import Teacher
from tests.conftest import random_model

STEPS = 4


@pytest.fixture
def make(traces: Callable[..., Any], tmp_path: Path) -> Callable[..., Setup]:
    """``make(teacher, model, blocks, mmr options, train options)``."""

    def made(teacher: Any, model: Any, blocks: list[int], train: dict[str, Any] | None = None, **mmr: Any) -> Setup:
        options = {"batch_size": 4, "learning_rate": 5e-3, **(train or {})}
        return Setup(
            model=model,
            teacher=Teacher(teacher),
            blocks=blocks,
            metric=lambda model, variants: [],
            rows=traces(STEPS * 4),
            heldout=traces(5, seed=9, held_out=True),
            config=ScoreConfig(mmr=MmrConfig(**{"steps": STEPS, "trainable": "mixer", **mmr})),
            train=TrainConfig(**options),
            mixer=MixerConfig(),
            seed=7,
            kernels="auto",
            dtype="float32",
            scratch=tmp_path / "scratch",
            report=lambda block, row: None,
        )

    return made


@pytest.fixture
def hybrid_setup(llama: Any, make: Callable[..., Setup]) -> Setup:
    """Blocks 1 and 2 of a hybrid whose first and last block are mamba1 already."""
    return make(llama, hybridize(llama, ["mamba1", "attention", "attention", "mamba1"], MixerConfig()), [1, 2])


def same(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """Equal rows to float tolerance, and the same order; the training did something."""
    assert [row["block"] for row in one] == [row["block"] for row in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
        assert abs(mine["loss_end"] - mine["loss_start"]) > 1e-4
    assert spearman(mmr.order(one), mmr.order(other)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("family", "hybrid", "trainable", "train"),
    [
        ("llama", False, "mixer", {"max_grad_norm": 0.05, "warmup_steps": 2}),
        ("llama", True, "block", {"gradient_accumulation": 2, "weight_decay": 0.3, "loss": "annealed_kl"}),
        ("qwen3", True, "mixer", {"mixer_learning_rate": 2e-2, "temperature": 2.0}),
        ("granite", True, "block", {"gradient_checkpointing": True, "max_grad_norm": 0.0}),
        ("smollm3", False, "mixer", {"loss": "0.5 jsd + 0.5 cross_entropy"}),
    ],
)
def test_rows_are_those_of_separate_trainings(
    family: str, hybrid: bool, trainable: str, train: dict[str, Any], make: Callable[..., Setup]
) -> None:
    teacher = random_model(family)
    placed = ["attention", "mamba2", "attention", "attention"]
    model = hybridize(teacher, placed, MixerConfig()) if hybrid else teacher
    blocks = [0, 2, 3] if hybrid else [0, 3]
    setup = make(teacher, model, blocks, train, trainable=trainable)
    same(lockstep.lockstep(setup), mmr.separate(setup))


def test_rows_in_bfloat16_are_those_of_separate_trainings(hybrid_setup: Setup) -> None:
    teacher = copy.deepcopy(hybrid_setup.teacher.model).to(torch.bfloat16)
    setup = replace(hybrid_setup, teacher=Teacher(teacher), dtype="bfloat16")
    same(lockstep.lockstep(setup), mmr.separate(setup))


def test_a_candidates_row_does_not_depend_on_the_others(hybrid_setup: Setup) -> None:
    """In one group, in groups of one, or alone: the very same figures."""
    together = lockstep.lockstep(hybrid_setup)
    config = ScoreConfig(mmr=replace(hybrid_setup.config.mmr, candidates_at_once=1))
    assert lockstep.lockstep(replace(hybrid_setup, config=config)) == together
    assert lockstep.lockstep(replace(hybrid_setup, blocks=[2])) == together[1:]


def test_score_takes_the_one_or_the_other(hybrid_setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(mmr, "lockstep", lambda setup: taken.append("lockstep") or [])
    monkeypatch.setattr(mmr, "separate", lambda setup: taken.append("separate") or [])
    for trainable in ("mixer", "block", "all"):
        for wanted in (True, False):
            mmr.score(replace(hybrid_setup, config=ScoreConfig(mmr=MmrConfig(trainable=trainable, lockstep=wanted))))
    assert taken == ["lockstep", "separate", "lockstep", "separate", "separate", "separate"]
    hybrid_setup.model.config.attention_dropout = 0.1
    assert not lockstep.serves(hybrid_setup), "what is drawn on the way would not be the same"


def test_one_pass_of_the_teacher_and_only_the_blocks_above(
    llama: Any, make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, passes, asked = make(llama, llama, [0, 1, 2, 3]), [0], [0]
    forward, hidden = LlamaMLP.forward, Teacher.hidden
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: passes.__setitem__(0, passes[0] + 1) or forward(*args))
    monkeypatch.setattr(Teacher, "hidden", lambda *args: asked.__setitem__(0, asked[0] + 1) or hidden(*args))
    lockstep.lockstep(setup)
    batches = STEPS + 2 * 2  # held-out rows before and after, two batches each
    assert asked[0] == batches
    assert passes[0] == batches * (4 + 3 + (4 + 3 + 2 + 1))  # teacher, current model below the last, candidates


@pytest.mark.parametrize("trainable", ["mixer", "block"])
def test_only_what_is_trained_is_a_candidates_own(hybrid_setup: Setup, trainable: str) -> None:
    setup = replace(hybrid_setup, config=ScoreConfig(mmr=MmrConfig(steps=STEPS, trainable=trainable)))
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    group = lockstep.Group(setup, [1, 2])
    theirs = {tensor.data_ptr() for tensor in setup.model.state_dict().values()}
    group.train(lockstep.Countdown("", STEPS))
    for candidate in group.candidates:
        part = f"model.layers.{candidate.block}." + ("self_attn." if trainable == "mixer" else "")
        for name, parameter in candidate.model.named_parameters():
            assert (parameter.data_ptr() in theirs) != name.startswith(part), name
            assert parameter.requires_grad == name.startswith(part), name
            assert parameter.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())


def test_groups_fit_in_the_free_memory(hybrid_setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sum(p.numel() for p in lockstep.shared(hybrid_setup, 1, {}).model.layers[1].self_attn.parameters()) * 4
    for free, wanted in ((0.0, 1), (2.5 * 4 * own / lockstep.SHARE, 2), (1e15, 2)):
        monkeypatch.setattr(lockstep, "free_memory", lambda device, free=free: free)
        assert min(lockstep.at_once(hybrid_setup), 2) == wanted


def test_a_loss_that_is_not_finite_names_its_block(hybrid_setup: Setup) -> None:
    train = replace(hybrid_setup.train, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match=r"the loss of block 1 became nan at step \d: lower train.learning_rate"):
        lockstep.lockstep(replace(hybrid_setup, train=train))
