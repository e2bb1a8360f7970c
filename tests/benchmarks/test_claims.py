"""The claims: every comparison is at equal tokens, an arm is what its name says, what is known is not run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import arms
from benchmarks.arms import Arm, Bench, ancestor, depth, run_all, seeded
from benchmarks.claims import Claims, markdown, placed_in, rows_of
from distill.records import read_json

LOO = [7, 8, 9, 6, 3, 5, 4, 2, 1, 0]
BASE = Arm((), steps=100)


def fake(arms: list[Arm]) -> dict[Arm, dict[str, Any]]:
    """Figures that depend on the arm: a later block costs more."""
    return {
        arm: {
            "tokens": arm.tokens,
            "start": {"reverse_kl": -float(sum(arm.blocks)), "forward_kl": 1.0},
            "end": {"reverse_kl": float(sum(arm.blocks)) + arm.seed, "forward_kl": 0.5},
            "accuracy": 0.5 + arm.seed / 10,
            "train_seconds": 2.0 if arm.trainable == "all" else 1.0,
            "seconds": 3.0,
        }
        for arm in arms
    }


@pytest.fixture
def claims() -> Claims:
    return Claims(LOO, BASE, fake)


def test_every_claim_compares_at_equal_tokens(claims: Claims) -> None:
    groups = {"losses": 4, "staged": 2, "init": 2, "layout": 2}  # so many variants share one budget
    for name, claim in claims.table().items():
        arms = list(claim.variants(0).values())
        size = groups.get(name, len(arms))
        for start in range(0, len(arms), size):
            assert len({arm.tokens for arm in arms[start : start + size]}) == 1, name
        assert len(set(arms)) == len(arms) or name == "placement", name


def test_the_same_label_means_the_same_arm_under_another_seed(claims: Claims) -> None:
    for name, claim in claims.table().items():
        if name != "placement":  # there MMR chooses by seed
            assert {label: seeded(arm, 1) for label, arm in claim.variants(0).items()} == claim.variants(1)


def test_staged_arms_end_with_the_blocks_of_the_one_at_once(claims: Claims) -> None:
    variants = claims.staged(0)
    for whole, parts in (("7 at once", "5 -> 7"), ("8 at once", "5 -> 7 -> 8")):
        arm, blocks = variants[parts], []
        for rank in range(depth(arm) + 1):
            blocks += ancestor(arm, rank).blocks
        assert sorted(blocks) == list(variants[whole].blocks)


def test_a_name_stands_for_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"blocks": (2,)}, {"seed": 1}, {"steps": 3}, {"loss": "jsd"}, {"learning_rate": 1e-4}, {"init": "fresh"},
        {"mixer_learning_rate": 1e-3}, {"z_init": "identity"}, {"trainable": "mixer"}, {"start": Arm((3,))},
    ]  # fmt: skip
    names = {Arm((1,)).name, *(replace(Arm((1,)), **change).name for change in changes)}
    assert len(names) == len(changes) + 1


def test_table_shows_mean_and_deviation(claims: Claims) -> None:
    claim = claims.table()["init"]
    seeds = [0, 1, 2]
    rows = rows_of(claim, fake([arm for seed in seeds for arm in claim.variants(seed).values()]), seeds)
    assert rows[0]["accuracy %"] == pytest.approx(60) and rows[0]["accuracy % sd"] == pytest.approx(10)
    assert rows[0]["by seed"] == [50.0, 60.0, 70.0] and rows[0]["tokens"] == 102_400
    assert "| mil, annealed_kl, 102k | 102k |" in markdown(rows) and "60.0 ± 10.0" in markdown(rows)


def test_tables_take_their_places_and_no_other() -> None:
    document = "a\n<!-- init -->\nold\n<!-- /init -->\nb\n<!-- losses -->\nkept\n<!-- /losses -->\n"
    placed = placed_in(document, "init", "new")
    assert placed == document.replace("\nold\n", "\n\nnew\n\n") and placed_in(placed, "init", "new") == placed
    assert placed_in(document, "depth", "new") == document


def test_mmr_ranks_by_the_loss_it_says(claims: Claims) -> None:
    assert claims.mmr_order(0) == list(range(10)) and claims.mmr_order(0, when="start") == list(range(9, -1, -1))
    ranks = claims.mmr_ranks({}, [0, 1])
    assert ranks["spearman_start_end"] == [-1.0, -1.0] and ranks["spearman_between_seeds"] == [1.0]
    cheap = claims.mmr_trainable({}, [0, 1])
    assert cheap["time_ratio"] == 0.5 and cheap["spearman_mixer_all"] == [1.0, 1.0]


@pytest.mark.slow
def test_an_arm_is_trained_as_it_says_and_known_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "HELD_OUT_ROWS", 8)
    threads = torch.get_num_threads()
    try:
        bench = Bench(tmp_path)
        arm = Arm((8,), steps=2, batch_size=2, trainable="mixer", generate=False)
        found = bench.run(arm)
        assert found["start"]["reverse_kl"] > 0 and found["end"] != found["start"]
        (tmp_path / f"{arm.name}.json").unlink()
        again = Bench(tmp_path).run(arm)
        assert (again["start"], again["end"]) == (found["start"], found["end"])
        later = bench.run(Arm((9,), steps=1, batch_size=2, generate=False, start=arm))
        assert later["tokens"] == 3 * 2 * 128
    finally:
        torch.set_num_threads(threads)
    results = run_all([arm], tmp_path, jobs=1)  # from the folder: no process is started
    assert results[arm] == read_json(tmp_path / f"{arm.name}.json")
