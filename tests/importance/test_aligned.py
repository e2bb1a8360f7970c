"""Scores by aligned mixers: shared prefixes change none, and what costs nothing, or helps most, is known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import AlignedConfig, MixerConfig, ScoreConfig, TrainConfig
from distill.hybrid.surgery import hybridize
from distill.importance import Setup, aligned, greedy, kl_restore
from distill.importance import search as searching
from distill.importance.alignment import swapped
from distill.importance.mmr import loss_of
from distill.importance.search import search
from distill.teacher import Teacher

STEPS = 4


@pytest.fixture
def make_setup(traces: Callable[..., Any], tmp_path: Path) -> Callable[..., Setup]:
    def make(model: Any, teacher: Any, blocks: list[int], **keys: Any) -> Setup:
        return Setup(
            model=model,
            teacher=Teacher(teacher),
            blocks=blocks,
            metric=lambda model, variants: [],
            rows=traces(STEPS * 4),
            heldout=traces(5, seed=9, held_out=True),
            config=ScoreConfig(aligned=AlignedConfig(steps=STEPS, learning_rate=2e-3, heldout_tokens=5 * 64)),
            train=TrainConfig(batch_size=4),
            mixer=MixerConfig(),
            seed=7,
            kernels="auto",
            dtype="float32",
            scratch=tmp_path / "scratch",
            report=lambda block, row: None,
            **keys,
        )

    return make


def test_scores_are_the_held_out_losses_of_the_swapped_models(
    family: Any, hybrid_family: Any, make_setup: Callable[..., Setup]
) -> None:
    """Bit for bit what the whole model gives, in which the blocks below are run again."""
    reported: list[int] = []
    setup = make_setup(hybrid_family, family, [1, 2])
    result = aligned.score(replace(setup, report=lambda block, row: reported.append(block)))
    _, mixers = aligned.aligned_mixers(setup)
    for row in result["blocks"]:
        with swapped(hybrid_family, {row["block"]: mixers[row["block"]]}):
            assert row["score"] == loss_of(setup, hybrid_family)
        assert row["error_end"] < row["error_start"]
    assert reported == [1, 2] and sorted(result["order"]) == [1, 2]
    assert result["baseline"] == loss_of(setup, hybrid_family)
    assert (result["steps"], result["heldout_tokens"]) == (STEPS, 5 * 64)


def test_a_candidates_score_does_not_depend_on_the_others(llama: Any, make_setup: Callable[..., Setup]) -> None:
    together = aligned.score(make_setup(llama, llama, [0, 1, 2, 3]))
    torch.manual_seed(2)
    alone = aligned.score(make_setup(llama, llama, [2]))
    assert together["blocks"][2] == alone["blocks"][0]
    assert together["baseline"] == 0.0, "the teacher's own"


def test_only_the_blocks_from_the_swapped_one_on_are_run_again(llama: Any, make_setup: Callable[..., Setup]) -> None:
    setup = replace(
        make_setup(llama, copy.deepcopy(llama), [0, 1, 2, 3]), heldout=[make_setup(llama, llama, []).heldout[0]]
    )
    kept = aligned.aligned_mixers(setup)
    ran = [0] * 4
    for block, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_hook(lambda *_, block=block: ran.__setitem__(block, ran[block] + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligned, "aligned_mixers", lambda _: kept)
        aligned.score(setup)
    assert ran == [2, 3, 4, 5]  # the recorded pass, and the candidates up to each block


def test_kept_mixers_are_not_trained_again(llama: Any, make_setup: Callable[..., Setup], tmp_path: Path) -> None:
    """Another session goes on from them: the same scores, and of what was made from other inputs none."""
    setup = make_setup(llama, llama, [1, 3], kept=tmp_path / "kept", fingerprint="a")
    wanted = aligned.score(setup)
    assert aligned.score(replace(setup, rows=[])) == wanted
    with pytest.raises(AssertionError, match="too few rows"):
        aligned.score(replace(setup, rows=[], fingerprint="b"))


def test_a_model_in_half_precision(llama: Any, make_setup: Callable[..., Setup]) -> None:
    """Mixers are aligned with float32 weights, and scored as the model of the stage holds them."""
    model = llama.bfloat16()
    setup = replace(make_setup(model, copy.deepcopy(model), [1, 2]), dtype="bfloat16")
    found, mixers = aligned.aligned_mixers(setup)
    assert {p.dtype for p in found.mixers[1].parameters()} == {torch.float32}
    assert (mixers[1].in_proj.weight.dtype, mixers[1].A_log.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixers[1].A_log, found.mixers[1].A_log)
    for row in aligned.score(setup)["blocks"]:
        assert 0 < row["score"] < 10 and row["error_end"] < row["error_start"]


def test_blocks_whose_attention_does_nothing_are_free(llama: Any, make_setup: Callable[..., Setup]) -> None:
    with torch.no_grad():
        for block in (1, 3):
            llama.model.layers[block].self_attn.o_proj.weight.zero_()
    setup = make_setup(llama, llama, [0, 1, 2, 3], added=2)
    for scorer in (aligned, greedy, kl_restore):
        result = scorer.score(setup)
        assert result["order"][:2] == [1, 3], scorer
        assert sorted(result["order"]) == [0, 1, 2, 3] and [row["block"] for row in result["blocks"]] == [0, 1, 2, 3]
        free = [row["score"] for row in result["blocks"] if row["block"] in (1, 3)]
        assert free == [0.0, 0.0] and result["baseline"] == (0.0 if scorer is not kl_restore else result["baseline"])


def test_every_round_is_measured_beside_what_was_chosen_before(llama: Any, make_setup: Callable[..., Setup]) -> None:
    model = hybridize(llama, ["attention"] * 4, MixerConfig())  # the same, and takes a loss in place of its logits
    setup = make_setup(model, llama, [0, 1, 3])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, mixers = aligned.aligned_mixers(setup)
    for restore in (False, True):
        first, second = search(setup, mixers, 2, restore=restore)
        assert second.before == first.losses[first.chosen] == min(first.losses.values())
        for block, loss in second.losses.items():
            changed = {first.chosen, block}
            with swapped(model, {each: mixers[each] for each in mixers if (each in changed) != restore}):
                assert loss == loss_of(setup, model)
        assert first.chosen not in second.losses and len(second.losses) == 2
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


COST = {0: 1.0, 1: 1.1, 2: 1.5, 3: 4.0}
"""What each block costs alone; 0 and 1 do the same work, so that both together cost 6 more."""


def known(setup: Setup, within: Any, variations: Any, *, tokens: int = 0) -> tuple[float, list[float]]:
    """``heldout_losses`` of a model whose costs are known."""

    def loss() -> float:
        lost = {i for i, layer in enumerate(setup.model.model.layers) if hasattr(layer.self_attn, "mil_slots")}
        return sum(COST[block] for block in lost) + (6.0 if lost >= {0, 1} else 0.0)

    with within():
        before, losses = loss(), []
        for variation in variations:
            with variation.within():
                losses.append(loss())
    return before, losses


@pytest.mark.parametrize(
    ("scorer", "added", "wanted", "rounds"),
    [
        (greedy, 1, [0, 1, 2, 3], 1),
        (greedy, 2, [0, 2, 3, 1], 2),  # beside 0, block 1 costs 7.1
        (greedy, 3, [0, 2, 3, 1], 3),
        (kl_restore, 3, [2, 3, 0, 1], 1),  # where all are swapped 1 brings 7.1, 0 brings 7
        (kl_restore, 2, [0, 2, 3, 1], 2),
        (kl_restore, 1, [0, 2, 3, 1], 3),
    ],
)
def test_interactions_count(
    scorer: Any,
    added: int,
    wanted: list[int],
    rounds: int,
    llama: Any,
    make_setup: Callable[..., Setup],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(searching, "heldout_losses", known)
    setup = make_setup(llama, llama, [0, 1, 2, 3], added=added)
    result = scorer.score(replace(setup, config=ScoreConfig(aligned=AlignedConfig(steps=1))))
    assert result["order"] == wanted and len(result["rounds"]) == rounds
    assert [row["rank"] for row in result["blocks"]] == [1 + wanted.index(block) for block in range(4)]
