"""Several scores of the same candidates: which they are, and how far their orders agree."""

from __future__ import annotations

import pytest

from distill.config import MmrConfig, ScoreConfig
from distill.errors import UserError
from distill.importance.comparison import compared, entries, spearman


def test_each_entry_has_options_of_its_own() -> None:
    options = ScoreConfig(mmr=MmrConfig(steps=7), compare=["loo questions=9", "mmr trainable=mixer halving=true"])
    decides, loo, mmr = entries(options, "mmr")
    assert (decides.name, decides.scorer, decides.options) == ("mmr", "mmr", options)
    assert (loo.name, loo.scorer, loo.options.loo.questions) == ("loo questions=9", "loo", 9)
    assert (mmr.options.mmr.steps, mmr.options.mmr.trainable) == (7, "mixer")
    assert decides.apart and loo.apart and not mmr.apart
    assert options.mmr.trainable == "all"


def test_what_is_named_twice_is_taken_once() -> None:
    """The score that decides is its own best comparison, and its rows are hours of work."""
    found = entries(ScoreConfig(compare=["loo", "mmr", "mmr", "mmr steps=9"]), "loo")
    assert [entry.name for entry in found] == ["loo", "mmr", "mmr steps=9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnr", "unknown score.compare 'mnr'.*did you mean 'mmr'"),
        ("mmr trainble=mixer", "unknown key 'mmr.trainble'.*did you mean 'trainable'"),
        ("mmr mixer", "expected key=value, got 'mmr.mixer'"),
        ("uniform steps=1", "uniform has no options of its own"),
        ("", "unknown score.compare ''"),
    ],
)
def test_no_such_score(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        entries(ScoreConfig(compare=[text]), "mmr")


def test_spearman() -> None:
    assert spearman([3, 1, 2], [3, 1, 2]) == pytest.approx(1.0)
    assert spearman([3, 1, 2], [2, 1, 3]) == pytest.approx(-1.0)
    assert spearman([0, 1, 2, 3], [1, 0, 2, 3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([5], [5]) == 1.0


def test_compared() -> None:
    other = {"order": [1, 0, 2, 3], "blocks": [{"block": 1, "score": 0.1}]}
    (found,) = compared({"order": [0, 1, 2, 3]}, {"loo": other}, 1)
    assert found == {"scorer": "loo", "spearman": 0.8, "same_choice": 0, **other}
    assert compared({"order": [0, 1, 2, 3]}, {"loo": other}, 2)[0]["same_choice"] == 2
