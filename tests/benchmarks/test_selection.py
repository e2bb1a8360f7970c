"""The comparison of selectors: what shares a distillation, what is not run again, what the tables say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import selection
from benchmarks.selection import APRIEL_LOO, APRIEL_RELEASED, SELECTORS, SUBJECTS, Ledger, apriel_table, arms, carried
from distill.importance import available, parts
from distill.importance.combine import ordered

ORDERS = {"loo": [7, 8, 9, 6, 3, 4, 5, 2, 1, 0], "last": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}


def asked(**changes: Any) -> argparse.Namespace:
    known = {"teachers": ["embedded"], "selectors": list(SELECTORS), "seeds": [0, 1, 2], "once": [], "jobs": 1}
    return argparse.Namespace(**{**known, **changes})


def chosen(ledger: Ledger, teacher: str, label: str, order: list[int], seed: int = 0) -> None:
    common = {"kind": "selection", "teacher": teacher, "selector": label, "seed": seed, "order": order}
    ledger.add({**common, "scores": {}, "seconds": 2.0, "tokens": 1000})


def distilled(ledger: Ledger, teacher: str, blocks: tuple[int, ...], seed: int) -> None:
    """Blocks of a higher number cost less."""
    accuracy = sum(blocks) / 45 - seed / 100
    common = {"kind": "arm", "teacher": teacher, "blocks": sorted(blocks), "seed": seed, "tokens": 51200}
    ledger.add(
        {**common, "reverse_kl": 1 - accuracy, "forward_kl": 0.0, "accuracy": accuracy, "families": {}, "seconds": 1.0}
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "ledger.jsonl")
    for label, order in ORDERS.items():
        chosen(found, "embedded", label, order)
    return found


def test_every_selector_is_a_score() -> None:
    assert {selector.score for selector in SELECTORS.values()} <= set(available())
    assert {"loo", "mmr", "aligned", "greedy", "kl_restore", "recall_drop", "combine", "uniform", "random"} <= {
        selector.score for selector in SELECTORS.values()
    }
    assert all(len(subject.counts) >= 3 for subject in SUBJECTS.values())


def test_selectors_that_agree_share_a_distillation(ledger: Ledger) -> None:
    wanted = arms(ledger, asked())
    blocks = [job[2] for job in wanted if job[3] == 0]
    assert blocks == [(3, 6, 7, 8, 9), (5, 6, 7, 8, 9), (3, 4, 6, 7, 8, 9), (4, 5, 6, 7, 8, 9), (3, 4, 5, 6, 7, 8, 9)]
    assert len(wanted) == 3 * len(blocks), "the same for each seed"
    distilled(ledger, "embedded", (3, 4, 5, 6, 7, 8, 9), 1)
    assert len(arms(ledger, asked())) == len(wanted) - 1


def test_what_the_ledger_has_is_not_run_again(ledger: Ledger) -> None:
    again = Ledger(ledger.path)
    assert again.rows == ledger.rows
    left = list(selection.selections(again, asked(selectors=["loo", "last", "aligned", "random"], once=["aligned"])))
    assert left == [
        ("teacher", "embedded"), ("selection", "embedded", "aligned", 0), ("selection", "embedded", "random", 0),
        ("selection", "embedded", "random", 1), ("selection", "embedded", "random", 2),
    ]  # fmt: skip


def test_jobs_go_to_the_ledger_as_they_are_done(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Inline:
        """Futures that are done at once."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Inline:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, function: Any, *given: Any) -> Any:
            found = selection.Future()
            found.set_result({"kind": "arm", "teacher": given[0][1], "blocks": list(given[0][2]), "seed": given[0][3]})
            return found

    monkeypatch.setattr(selection, "ProcessPoolExecutor", Inline)
    jobs = arms(ledger, asked())
    selection.run(jobs, ledger, asked())
    assert not arms(Ledger(ledger.path), asked()) and f"{len(jobs)}/{len(jobs)}" in capsys.readouterr().out


def test_ranks_of_the_ledger_are_averaged_as_the_score_does(ledger: Ledger) -> None:
    chosen(ledger, "embedded", "aligned", [8, 7, 6, 3, 4, 5, 2, 9, 1, 0], seed=1)
    assert ledger.combined("embedded", "loo + aligned", 0) is None, "the other has no order of this seed"
    row = ledger.combined("embedded", "loo + aligned", 1)
    assert row is not None and row["order"][:3] == [7, 8, 6] and row["seconds"] == 4.0
    assert row["scores"]["9"] == (3 + 8) / 2 and sorted(row["order"]) == list(range(10))
    assert ordered([{"block": int(b), "score": s, "rank_first": 0} for b, s in row["scores"].items()])[0] == 7
    assert parts(selection.ScoreConfig(combine=["loo", "aligned"]), "combine") == ["loo", "aligned"]


def test_tables_show_means_errors_and_costs(ledger: Ledger) -> None:
    for seed in (0, 1, 2):
        for job in arms(ledger, asked(seeds=[seed])):
            distilled(ledger, "embedded", job[2], seed)
    table = selection.quality_table(ledger, "embedded", [0, 1, 2])
    assert [row["selector"] for row in table] == ["last", "loo"], "the best first"
    assert table[0]["accuracy %, h = 5"] == "76.8 ± 0.6" and table[0]["arms"] == 9 and table[0]["s"] == 2.0
    text = selection.markdown(table)
    assert text.splitlines()[2].startswith("| last | ") and "| 1k |" in text
    assert selection.correlation_table(ledger, "embedded", [0])[0]["last"] == "0.90"


def test_whether_the_ranking_of_selectors_carries_over(ledger: Ledger) -> None:
    assert carried(ledger, [0]) == {}
    chosen(ledger, "embedded", "first", list(range(10)))
    for label, order in (
        ("loo", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("last", [7, 6, 5, 4, 3, 2, 0, 1]),
        ("first", list(range(8))),
    ):
        chosen(ledger, "small", label, order)
    for job in arms(ledger, asked(teachers=["embedded", "small"], seeds=[0])):
        distilled(ledger, job[1], job[2], 0)
    found = carried(ledger, [0])
    assert found["selectors"] == 3 and found["spearman"] == pytest.approx(0.87, abs=0.01)
    assert json.dumps(found)


def test_the_papers_own_orders() -> None:
    """H1-25 is the first half of the released order by LOO; what MMR added later is not what follows there."""
    assert len(set(APRIEL_LOO)) == 49 and set(APRIEL_LOO[:25]) == set(APRIEL_RELEASED[25])
    table = apriel_table()
    assert [row["MMR added"] for row in table] == ["3, 5", "6, 7, 8"] and [row["in common"] for row in table] == [0, 0]
    assert table[0]["LOO would have added"] == "34, 29" and table[1]["LOO would have added"] == "34, 29, 28"
