"""The Pareto frontier of accuracy against throughput, and the hybrid to ship."""

from __future__ import annotations

from typing import Any

import pandas as pd

KEEP = 0.95
"""Share of the teacher's mean generative accuracy that a hybrid must keep, if nothing else is asked for."""


def on_frontier(frame: pd.DataFrame, x: str = "ratio", y: str = "generative") -> pd.Series[bool]:
    """Whether no other row is at least as good in both `x` and `y` and better in one; never with a NaN.

    Speed counts as the ratio to the teacher timed in the same run: tokens/s also vary with what else a machine does.
    """
    known = frame[[x, y]].dropna()

    def dominated(point: pd.Series[float]) -> bool:
        no_worse = (known[x] >= point[x]) & (known[y] >= point[y])
        better = (known[x] > point[x]) | (known[y] > point[y])
        return bool((no_worse & better).any())

    best = [i in known.index and not dominated(known.loc[i]) for i in frame.index]
    return pd.Series(best, index=frame.index, dtype=bool)


def best_hybrid(frame: pd.DataFrame, keep: float = KEEP) -> pd.Series[Any] | None:
    """The hybrid of the largest ratio that keeps `keep` of the teacher's mean generative accuracy, if any.

    Of a stage and what was made of it by further training, which are equally fast, the more accurate one counts. A GGUF
    file is none of them: its speed is that of another engine than the teacher's.
    """
    floor = keep * frame["generative"].iloc[0]
    good = frame[(frame["stage"] > 0) & (frame["generative"] >= floor) & frame["ratio"].notna()]
    good = good[good["backend"] == "hf"] if "backend" in good else good
    good = good.sort_values(["generative", "tokens"], ascending=[True, False])
    good = good.groupby(["run", "stage"] if "run" in good else "stage").tail(1)
    return None if good.empty else good.sort_values("ratio", kind="stable").iloc[-1]
