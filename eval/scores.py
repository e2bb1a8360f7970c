"""What lm-eval's results say, as the rows of a record: values, standard errors, counts; and as lines of a terminal.

With k samples of a question its score is the mean over them (pass@1), and the standard error is that of the mean over
questions, each with its samples as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from distill.data.families import DISTANCES

LINE = 110
"""Columns of a terminal that a line of `Scores.lines` may fill before it is folded."""
METRICS = ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc")
"""A task's own figure: the first of these that it has, or else (RULER) its shortest length."""
FILTER = "flexible-extract"
"""The way of finding the answer in a text that is taken where a task has several; otherwise its first."""
COUNTS = {"truncated": "truncated", "empty": "empty", "cut": "prompts cut"}
"""Counts of a row, and what they are called on the terminal."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """What a model scored: rows of task, kind, metric, value, stderr, n, counts; and, of each generative task whose
    questions carry a distance, rows of task, distance, value, stderr, n. Values are fractions."""

    rows: list[Row] = field(default_factory=list)
    by_distance: list[Row] = field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in ``measure.json`` and ``scores.json``."""
        return {"accuracy": self.rows, "by_distance": self.by_distance}

    def lines(self) -> list[str]:
        """A line a task for the terminal, in per cent, neighbouring distances of equal accuracy as one:
        ``chase  exact_match  98.0% +- 1.4   3 truncated   by hops 1-3: 100  4: 95  5: 94``."""
        lines = []
        for row in self.rows:
            text = f"  {row['task']:18s} {row['metric']} {100 * row['value']:5.1f}% +- {100 * row['stderr']:.1f}"
            told = [f"{row[key]} {called}" for key, called in COUNTS.items() if row.get(key)]
            text += f"   {', '.join(told)}" if told else ""
            parts = []
            mine = (each for each in self.by_distance if each["task"] == row["task"])
            for percent, run in groupby(mine, key=lambda each: round(100 * each["value"])):
                ends = [str(each["distance"]) for each in run]
                parts.append(f"{'-'.join(dict.fromkeys([ends[0], ends[-1]]))}: {percent}")
            if parts:
                detail = f"by {DISTANCES.get(row['task'], 'distance')} {'  '.join(parts)}"
                text += f"   {detail}" if len(text) + len(detail) + 3 <= LINE else f"\n      {detail}"
            lines.append(text)
        return lines


def rows_of(
    passes: Sequence[Mapping[str, Any]],
    kind: str,
    counts: Callable[[list[str]], dict[str, int]] = lambda tasks: {},
    even: AbstractSet[str] = frozenset(),
) -> list[Row]:
    """Rows of lm-eval's results, one of each sample: a group that has a figure of its own stands for all its tasks,
    weighted by their questions, or (``even``) each the same. ``counts`` gives what else a row of such tasks says."""
    results = passes[0]
    parts = results.get("group_subtasks", {})
    figures = {task: key for task, each in results["results"].items() if (key := main_metric(each))}
    covered = {task for group in parts if group in figures for task in _descendants(parts, group)}
    rows: list[Row] = []
    for task, key in figures.items():
        if task in covered:  # already in its group's figure
            continue
        below = [each for each in _descendants(parts, task) if not parts.get(each)] or [task]
        each = {leaf: question_values(passes, leaf) for leaf in below}
        total = sum(len(values) for values in each.values())
        counted = {leaf: 1 if task in even else len(values) for leaf, values in each.items()}
        weight = sum(counted.values())
        shares = {leaf: share(list(values.values())) for leaf, values in each.items()}
        metric, _, way = key.partition(",")
        row = {
            "task": _name(task) if kind == "generative" else task,
            "kind": kind,
            "metric": metric,
            "value": sum(counted[leaf] * shares[leaf]["value"] for leaf in below) / weight,
            "stderr": sum((counted[leaf] * shares[leaf]["stderr"]) ** 2 for leaf in below) ** 0.5 / weight,
            "n": total,
            **counts(below),
        }
        rows.append({**row, **({"filter": way} if way != "none" else {}), **_samples(passes)})
    return rows


def rows_by_distance(passes: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of task, distance, value, stderr, n, from the samples that lm-eval logged of its documents: of each
    task whose documents carry a whole number ``distance``, by its own metric, in ascending order."""
    rows: list[Row] = []
    for task, samples in passes[0].get("samples", {}).items():
        values = question_values(passes, task)
        distances = {sample["doc_id"]: sample["doc"].get("distance") for sample in samples}
        found = {distances[question] for question in values if isinstance(distances[question], int)}
        for distance in sorted(found):
            mine = [value for question, value in values.items() if distances[question] == distance]
            rows.append({"task": _name(task), "distance": distance, **share(mine)})
    return rows


def question_values(passes: Sequence[Mapping[str, Any]], task: str) -> dict[Any, float]:
    """Question -> its score by the task's own metric, the mean over the samples. (RULER marks what a question does not
    tell about with -1.)"""
    metric, _, way = (main_metric(passes[0]["results"].get(task, {})) or "").partition(",")
    values: dict[Any, list[float]] = {}
    for results in passes:
        for sample in results["samples"].get(task, ()):
            if metric in sample and sample["filter"] == way and float(sample[metric]) >= 0:
                values.setdefault(sample["doc_id"], []).append(float(sample[metric]))
    return {question: sum(each) / len(each) for question, each in values.items()}


def share(values: Sequence[float]) -> Row:
    """The mean of one value a question, and its plain standard error (0 where all are equal, whatever the count)."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / len(values)
    return {"value": mean, "stderr": (spread / len(values)) ** 0.5, "n": len(values)}


def main_metric(figures: Mapping[str, Any]) -> str | None:
    """The key of the task's own metric, in lm-eval's form ``metric,filter``."""
    keys = [key for key, value in figures.items() if "," in key and isinstance(value, (int, float)) and value >= 0]
    lengths = sorted((key for key in keys if key.split(",")[0].isdigit()), key=lambda key: int(key.split(",")[0]))
    for wanted in METRICS:
        ways = [key for key in keys if key.split(",")[0] == wanted]
        if ways:
            return next((key for key in ways if key.endswith(f",{FILTER}")), ways[0])
    return lengths[0] if lengths else None


def _samples(passes: Sequence[Any]) -> Row:
    return {"samples": len(passes)} if len(passes) > 1 else {}


def _name(task: str) -> str:
    """How a generative task is called in a record: ``add`` for ``embedded_add``."""
    return task.removeprefix("embedded_")


def _descendants(parts: Mapping[str, list[str]], task: str) -> list[str]:
    """All tasks and groups below a group."""
    return [each for child in parts.get(task, []) for each in (child, *_descendants(parts, child))]
