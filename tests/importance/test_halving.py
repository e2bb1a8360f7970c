"""Successive halving: who is dropped, what it saves, and that what is left scores as in a full training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.config import MmrConfig, ScoreConfig
from distill.importance import Setup, halving, mmr
from tests.importance.test_lockstep import hybrid_setup, make  # noqa: F401

DROP = MmrConfig(steps=8, halving=True)
CHECK = MmrConfig(steps=8, halving_check=True)


def test_rungs() -> None:
    assert halving.rungs(MmrConfig(steps=100)) == [100]
    assert halving.rungs(MmrConfig(steps=100, halving=True)) == [25, 50, 100]
    assert halving.rungs(MmrConfig(steps=100, halving_check=True)) == [25, 50, 100]
    assert halving.rungs(MmrConfig(steps=1, halving=True)) == [1]
    assert halving.rungs(MmrConfig(steps=3, halving=True)) == [1, 3]


def test_the_better_half_survives_and_never_fewer_than_are_needed() -> None:
    losses = {1: 0.5, 3: 0.1, 5: 0.3, 7: 0.2, 9: 0.3}
    assert halving.survivors(losses, 1) == [3, 5, 7]  # of equal ones the first
    assert halving.survivors(losses, 4) == [3, 5, 7, 9]
    assert halving.survivors({2: 0.1}, 3) == [2]


def test_dropped_candidates_rank_behind_by_their_last_loss() -> None:
    rows = [
        {"block": 0, "score": 0.1, "steps": 2},
        {"block": 1, "score": 0.4, "steps": 8},
        {"block": 2, "score": 0.3, "steps": 2},
        {"block": 3, "score": 0.2, "steps": 4},
        {"block": 4, "score": 0.3, "steps": 8},
    ]
    assert halving.order(rows) == [4, 1, 3, 0, 2]


def full(block: int, *losses: float) -> dict[str, float]:
    return halving.row_of(block, dict(zip((0, 2, 4, 8), losses, strict=True)), CHECK)


def test_what_halving_would_have_chosen() -> None:
    rows = [full(0, 9, 4, 4, 1), full(1, 9, 3, 1, 2), full(2, 9, 2, 3, 3), full(3, 9, 1, 2, 4)]
    found = halving.summary(rows, CHECK, 1)["halving"]
    # at 2 steps 2 and 3 survive, at 4 steps 3, which is not what the full training chooses
    assert found == {"rungs": [2, 4, 8], "would_choose": [3], "changes_choice": True, "would_save": 0.5}
    assert halving.summary(rows, CHECK, 4)["halving"] == {
        "rungs": [2, 4, 8], "would_choose": [0, 1, 2, 3], "changes_choice": False, "would_save": 0.0,
    }  # fmt: skip
    assert halving.summary([], CHECK, 1) == halving.summary(rows, MmrConfig(), 1) == {}


def of(setup: Setup, **options: Any) -> dict[str, Any]:
    setup = replace(setup, config=ScoreConfig(mmr=replace(setup.config.mmr, **options)))
    return mmr.score(setup)


@pytest.mark.parametrize("trainable", [pytest.param("all", marks=pytest.mark.slow), "mixer"])
def test_halving_stops_the_worse_and_changes_no_figure(hybrid_setup: Setup, trainable: str) -> None:  # noqa: F811
    whole = of(hybrid_setup, trainable=trainable, halving_check=True)
    halved = of(hybrid_setup, trainable=trainable, halving=True)
    rows = {row["block"]: row for row in whole["blocks"]}
    steps = {row["block"]: row["steps"] for row in halved["blocks"]}
    (dropped,) = [block for block, last in steps.items() if last == 1]
    assert dropped == max(rows, key=lambda block: rows[block]["loss_1"])
    for row in halved["blocks"]:
        for key in row.keys() - {"score", "loss_end", "steps"}:
            assert row[key] == rows[row["block"]][key], key
        assert row["loss_end"] == rows[row["block"]]["loss_1" if row["block"] == dropped else "loss_end"]
    assert halved["halving"] == {"rungs": [1, 2, 4], "steps_run": 5, "steps_full": 8, "saved": 0.375}
    assert halved["order"] == [block for block in (1, 2) if block != dropped] + [dropped]
    assert whole["halving"]["would_choose"] == halved["order"][:1] and whole["halving"]["would_save"] == 0.375


def test_halving_that_was_cut_short_goes_on(hybrid_setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    setup = replace(
        hybrid_setup, config=ScoreConfig(mmr=replace(hybrid_setup.config.mmr, trainable="all", halving=True))
    )
    wanted = mmr.score(setup)
    fit, trained = mmr.fit, list[str]()

    def cut(*args: Any, title: str, **kwargs: Any) -> Any:
        if len(trained) == 2:
            trained.append("cut")
            raise KeyboardInterrupt
        trained.append(title)
        return fit(*args, title=title, **kwargs)

    monkeypatch.setattr(mmr, "fit", cut)
    setup = replace(setup, scratch=setup.scratch.with_name("again"))
    with pytest.raises(KeyboardInterrupt):
        mmr.score(setup)
    assert mmr.score(setup) == wanted
    assert len(trained) == 5, "two at the first rung, one cut short, the survivor at two further rungs"
