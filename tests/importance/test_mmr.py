"""MIL-Mamba-replacement: each candidate is a copy, seen on the same data, scored on the same held-out tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import MixerConfig, MmrConfig, ScoreConfig, TrainConfig
from distill.hybrid.surgery import hybridize
from distill.importance import Setup, mmr
from distill.teacher import Teacher
from distill.trainer import heldout_loss

STEPS = 3
Weights = dict[str, torch.Tensor]


def weights(model: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def setup(llama: Any, traces: Callable[..., Any], tmp_path: Path) -> Setup:
    """Blocks 1 and 2 of a hybrid whose first and last block are already mamba1."""
    return Setup(
        model=hybridize(llama, ["mamba1", "attention", "attention", "mamba1"], MixerConfig(), seed=0),
        teacher=Teacher(llama),
        blocks=[1, 2],
        metric=lambda model, variants: [],
        rows=traces(STEPS * 4),
        heldout=traces(5, seed=9, held_out=True),
        config=ScoreConfig(mmr=MmrConfig(steps=STEPS)),
        train=TrainConfig(batch_size=4, learning_rate=2e-3),
        mixer=MixerConfig(),
        seed=7,
        kernels="auto",
        dtype="float32",
        scratch=tmp_path / "scratch",
        report=lambda block, row: None,
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """For each candidate: the model, its weights before and after training, and the rows it saw."""
    seen: list[dict[str, Any]] = []
    fit = mmr.fit

    def watch(trainer: Any, model: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({"model": model, "before": weights(model), "rows": rows, "training": model.training})
        result = fit(trainer, model, rows, *args, **kwargs)
        seen[-1]["after"] = weights(model)
        return result

    monkeypatch.setattr(mmr, "fit", watch)
    return seen


def test_scores_are_the_losses_of_the_trained_candidates(setup: Setup, watched: list[dict[str, Any]]) -> None:
    reported: list[int] = []
    result = mmr.score(replace(setup, report=lambda block, row: reported.append(block)))
    assert [row["block"] for row in result["blocks"]] == reported == [1, 2]
    for row, candidate in zip(result["blocks"], watched, strict=True):
        block = row["block"]
        placement = ["mamba1", "attention", "attention", "mamba1"]
        placement[block] = "mamba1"
        model = hybridize(setup.model, placement, setup.mixer, seed=setup.seed)
        assert equal(candidate["before"], weights(model)), "the candidate starts as the swap step would make it"
        assert candidate["rows"] is setup.rows and candidate["training"]

        def loss(state: Weights, model: Any = model) -> float:
            model.load_state_dict(state)
            return heldout_loss(model, setup.teacher, setup.heldout, 2, "reverse_kl", 1.0)

        assert row["loss_start"] == pytest.approx(loss(candidate["before"]), rel=1e-5)
        assert row["loss_end"] == pytest.approx(loss(candidate["after"]), rel=1e-5)
        assert row["score"] == row["loss_end"] < row["loss_start"]
        moved = [
            name for name in candidate["before"] if not torch.equal(candidate["before"][name], candidate["after"][name])
        ]
        assert len(moved) == len(candidate["before"]), "everything is trained"
    ends = {row["block"]: row["loss_end"] for row in result["blocks"]}
    assert result["order"] == sorted(ends, key=lambda block: ends[block])
    assert (result["steps"], result["trainable"], result["heldout_tokens"]) == (STEPS, "all", 5 * 64)


def test_the_model_and_the_teacher_are_left_as_they_were(setup: Setup) -> None:
    before = weights(setup.model), weights(setup.teacher.model)
    config = setup.model.config.to_dict()
    flags = [p.requires_grad for p in setup.model.parameters()]
    mode = setup.model.training
    mmr.score(setup)
    assert equal(weights(setup.model), before[0]) and equal(weights(setup.teacher.model), before[1])
    assert setup.model.config.to_dict() == config and setup.model.training == mode
    assert [p.requires_grad for p in setup.model.parameters()] == flags
    assert all(p.grad is None for p in setup.model.parameters())
    assert not list(setup.scratch.glob("*/*"))


def test_run_twice_gives_the_same_scores(setup: Setup) -> None:
    torch.manual_seed(1)
    first = mmr.score(replace(setup, blocks=[2]))
    torch.manual_seed(2)
    assert mmr.score(replace(setup, blocks=[2])) == first


def test_a_candidates_score_does_not_depend_on_the_others(setup: Setup) -> None:
    together = {row["block"]: row for row in mmr.score(setup)["blocks"]}
    (alone,) = mmr.score(replace(setup, blocks=[2]))["blocks"]
    assert alone == together[2]


def test_trainable_mixer_trains_only_the_new_mixer(setup: Setup, watched: list[dict[str, Any]]) -> None:
    options = replace(setup.config, mmr=MmrConfig(steps=STEPS, trainable="mixer", lockstep=False))
    result = mmr.score(replace(setup, config=options))
    assert result["trainable"] == "mixer"
    for row, candidate in zip(result["blocks"], watched, strict=True):
        for name, tensor in candidate["before"].items():
            inside = name.startswith(f"model.layers.{row['block']}.self_attn.")
            assert torch.equal(candidate["after"][name], tensor) != inside, name
        assert row["loss_end"] < row["loss_start"]


def test_candidates_of_a_plain_teacher(llama: Any, setup: Setup, watched: list[dict[str, Any]]) -> None:
    """The first stage may be scored by MMR too: the current model is then the teacher itself, frozen."""
    result = mmr.score(replace(setup, model=llama, blocks=[3]))
    assert result["order"] == [3]
    assert watched[0]["model"].config.mixers == ["attention", "attention", "attention", "mamba1"]
    assert not equal(watched[0]["before"], watched[0]["after"])


def test_order_breaks_ties_by_block() -> None:
    rows = [{"block": 4, "score": 0.2}, {"block": 1, "score": 0.3}, {"block": 2, "score": 0.2}]
    assert mmr.order(rows) == [2, 4, 1]
