"""Scores that measure nothing, combined ranks, and recall against the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.config import RecallDropConfig, ScoreConfig
from distill.errors import UserError
from distill.importance import Setup, Variant, apart, available, join, needs, scorer
from distill.importance.combine import ordered
from distill.teacher import Teacher
from tests.importance.test_loo import IDS, make_setup

BASELINES = ("uniform", "random", "first", "last", "given")


def depth(layers: int) -> Any:
    """All of a model that a baseline looks at."""
    return SimpleNamespace(config=SimpleNamespace(num_hidden_layers=layers))


@pytest.fixture
def setup(llama: Any, tmp_path: Path) -> Setup:
    return make_setup(llama, [0, 1, 2, 3], tmp_path)


def order(setup: Setup, name: str) -> list[int]:
    found: list[int] = scorer(name)(setup)["order"]
    return found


def test_first_and_last_go_by_depth(setup: Setup) -> None:
    assert order(setup, "first") == [0, 1, 2, 3] and order(setup, "last") == [3, 2, 1, 0]
    later = replace(setup, blocks=[1, 3])
    assert order(later, "first") == [1, 3] and order(later, "last") == [3, 1]


@pytest.mark.parametrize("layers", [4, 8, 10, 16, 50])
def test_uniform_is_spread_evenly_at_every_h(setup: Setup, layers: int) -> None:
    """No stretch of kept blocks is more than about twice as long as the shortest has to be, and half is every other."""
    setup = replace(setup, model=depth(layers), blocks=list(range(layers)))
    chosen = order(setup, "uniform")
    assert sorted(chosen) == list(range(layers))
    for h in range(1, layers):
        ends = [-1, *sorted(chosen[:h]), layers]
        assert max(b - a for a, b in pairwise(ends)) <= 2 * -(-(layers + 1) // (h + 1)) + 1, h
    if layers % 2 == 0:
        assert sorted(chosen[: layers // 2]) == list(range(1, layers, 2))


def test_random_depends_on_the_seed_and_on_no_other_candidate(setup: Setup) -> None:
    setup = replace(setup, model=depth(30), blocks=list(range(30)))
    first, again, other = order(setup, "random"), order(setup, "random"), order(replace(setup, seed=1), "random")
    assert first == again != other and sorted(first) == sorted(other)
    some = replace(setup, blocks=list(range(10)))
    assert order(some, "random") == [block for block in first if block < 10]


def test_a_list_by_hand_is_followed_and_the_rest_comes_last(setup: Setup) -> None:
    setup = replace(setup, config=ScoreConfig(given=[2, 0]))
    assert order(setup, "given")[:2] == [2, 0]
    assert order(replace(setup, blocks=[0, 1, 3]), "given") == [0, 1, 3]


@pytest.mark.parametrize("name", BASELINES)
def test_candidates_scored_apart_join_to_the_same_order(setup: Setup, name: str) -> None:
    """As the tasks of a job array do."""
    setup = replace(setup, config=ScoreConfig(given=[3, 1, 2]))
    whole = scorer(name)(setup)
    parts = [scorer(name)(replace(setup, blocks=[block])) for block in (2, 0, 3, 1)]
    assert apart(name) and join(name, parts)["order"] == whole["order"] and not needs(setup.config, name)


def test_ranks_are_averaged_and_the_first_score_breaks_ties(setup: Setup) -> None:
    reported: list[int] = []
    config = ScoreConfig(combine=["given", "first"], given=[1, 3, 0, 2])
    setup = replace(setup, config=config, report=lambda block, row: reported.append(block))
    record = scorer("combine")(setup)
    assert [row["score"] for row in record["blocks"]] == [2.0, 1.5, 3.5, 3.0] and record["order"] == [1, 0, 3, 2]
    assert record["parts"]["given"]["order"] == [1, 3, 0, 2] and record["blocks"][0]["rank_first"] == 1.0
    assert reported[-4:] == [0, 1, 2, 3] and not apart("combine")
    tied = [
        {"block": 0, "score": 1.5, "rank_a": 2.0, "rank_b": 1.0},
        {"block": 1, "score": 1.5, "rank_a": 1.0, "rank_b": 2.0},
        {"block": 2, "score": 3.0, "rank_a": 3.0, "rank_b": 3.0},
    ]
    assert ordered(tied) == [1, 0, 2]


def test_a_score_that_ranks_nothing_is_no_part_of_a_combination(setup: Setup) -> None:
    """Its ranks would be the blocks' numbers."""
    setup = replace(setup, config=ScoreConfig(combine=["given", "last"], given=[]))
    with pytest.raises(UserError, match="combine: given: all 4 blocks have the same score"):
        scorer("combine")(setup)


def test_a_combination_needs_what_its_parts_need() -> None:
    assert needs(ScoreConfig(combine=["loo", "mmr"]), "combine") == {"metric", "rows"}
    assert needs(ScoreConfig(combine=["uniform", "recall_drop"]), "combine") == {"tasks"}
    for name in set(available()) - {"combine"}:
        assert needs(ScoreConfig(), name) <= {"metric", "tasks", "rows"}


def recall_setup(setup: Setup, recall: Sequence[float], rest: Sequence[float]) -> Setup:
    """A setup whose tasks give these accuracies without block 0, 1, ...; everything is right in the whole model."""

    def tasks(names: Sequence[str], questions: int) -> Any:
        values = recall if names == ["look up"] else rest

        def metric(model: Any, variants: Sequence[Variant]) -> list[Mapping[str, float]]:
            assert len(variants) == 1 + len(values) and questions == 10
            common = {"stderr": 0.1, "questions": 10.0}
            return [{"accuracy": a, "loglikelihood": a - 2, **common} for a in (1.0, *values)]

        return metric

    options = RecallDropConfig(recall=["look up"], rest=["other"], questions=10)
    return replace(setup, config=ScoreConfig(recall_drop=options), tasks=tasks)


def test_recall_drop_is_the_ratio_of_the_two_losses(setup: Setup) -> None:
    """HALO: what only recall loses comes last, what only the rest loses first, what both lose has a score near 1."""
    record = scorer("recall_drop")(recall_setup(setup, [0.4, 1.0, 0.2, 0.9], [1.0, 0.5, 0.2, 1.0]))
    scores = {row["block"]: row["score"] for row in record["blocks"]}
    assert scores == pytest.approx({0: 0.6 / 0.1, 1: 0.0, 2: 0.8 / 0.9, 3: 0.1 / 0.1})
    assert record["order"] == [1, 2, 3, 0] and not apart("recall_drop")
    assert record["baseline"] == record["baseline_rest"] == 1.0


def test_recall_drop_tells_equal_scores_apart_by_likelihood(setup: Setup) -> None:
    record = scorer("recall_drop")(recall_setup(setup, [0.9, 0.9, 0.9, 0.9], [0.5, 0.5, 0.5, 0.5]))
    assert record["order"] == [0, 1, 2, 3]


def test_recall_drop_leaves_blocks_out_of_a_real_model(llama: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        llama.model.layers[2].self_attn.o_proj.weight.zero_()
        llama.model.layers[2].mlp.down_proj.weight.zero_()
    wanted = llama(IDS, use_cache=False).logits.argmax(-1)

    def tasks(names: Sequence[str], questions: int) -> Any:
        def metric(model: Any, variants: Sequence[Variant]) -> list[dict[str, float]]:
            found = []
            for variant in variants:
                with variant(), torch.no_grad():
                    logits = model(IDS, use_cache=False).logits
                right = float((logits.argmax(-1) == wanted).double().mean())
                found.append({"accuracy": right, "stderr": 0.0, "loglikelihood": right, "questions": 192.0})
            return found

        return metric

    setup = replace(make_setup(llama, [0, 1, 2, 3], tmp_path), teacher=Teacher(llama), tasks=tasks)
    record = scorer("recall_drop")(setup)
    assert record["order"][0] == 2, "the block that does nothing"
