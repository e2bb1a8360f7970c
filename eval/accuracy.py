"""Accuracy through lm-eval: generative and multiple-choice tasks, each figure with its standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.data.families import DISTANCES
from distill.errors import UserError, nearest
from eval.lm import lm

LINE = 110
"""Columns of a terminal that a line of `Scores.lines` may fill before it is folded."""


@dataclass(frozen=True)
class Scores:
    """What a model scored: rows of task, kind, metric, value, stderr, n; and, of each generative task whose
    questions carry a distance, rows of task, distance, value, stderr, n. Values are fractions."""

    rows: list[dict[str, Any]]
    by_distance: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in ``measure.json`` and ``scores.json``."""
        return {"accuracy": self.rows, "by_distance": self.by_distance}

    def lines(self) -> list[str]:
        """A line a task for the terminal, in per cent, neighbouring distances of equal accuracy as one:
        ``chase  exact_match  98.0% +- 1.4   by hops 1-3: 100  4: 95  5: 94``."""
        lines = []
        for row in self.rows:
            text = f"  {row['task']:18s} {row['metric']} {100 * row['value']:5.1f}% +- {100 * row['stderr']:.1f}"
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


@cache
def _manager(defaults: bool) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(Path(__file__).parent / "tasks"), include_defaults=defaults)


def task_manager(names: Sequence[str]) -> Any:
    """An lm-eval task manager that knows ``names``: the embedded suite alone where that is enough (reading the
    many thousand files of lm-eval's own tasks takes a while), otherwise all.

    Raises UserError for a task that is in neither, naming the nearest.
    """
    embedded = _manager(False)
    if all(name in embedded.all_tasks for name in names):
        return embedded
    everything = _manager(True)
    for name in names:
        if name not in everything.all_tasks:
            raise UserError(
                f"unknown task '{name}'{nearest(name, [*embedded.all_tasks, *everything.all_tasks])}; "
                "allowed: the embedded suite (embedded_generative, embedded_choice) and lm-eval's tasks"
            )
    return everything


def check_tasks(names: Sequence[str], *, allow_code: bool) -> None:
    """Raise UserError for a task that there is none of, or that runs code which the model wrote (HumanEval, MBPP)
    where ``allow_code`` does not say that it may."""
    index = task_manager(names).task_index
    for name in names:
        if not allow_code and (task := _running_code(index, name)):
            inside = "" if task == name else f" (in '{name}')"
            raise UserError(
                f"task '{task}'{inside} runs the Python code that the model writes, on this machine and with your "
                "rights: set measure.allow_code_execution=true if that is safe here (a container), or leave it out"
            )


def _running_code(index: Any, task: Any) -> str | None:
    """The first task that runs code of the model's in ``task``: the name of a task, group or tag, or what a group
    holds in place of a name (a mapping); None if there is none."""
    children: list[Any] = []
    if isinstance(task, str):
        entry = index.get(task)
        content = (entry.cfg if entry else None) or {}
        children = sorted(entry.tags) if entry and entry.cfg is None else []  # a tag
    else:
        content = task
    below = content.get("task")
    if content.get("unsafe_code"):
        return str(below)
    if isinstance(below, list):
        children = below
    elif below is not None and below != task:
        children = [below]
    return next((found for child in children if (found := _running_code(index, child))), None)


@contextmanager
def code_execution(allowed: bool) -> Iterator[None]:
    """Within the context, the metric that runs code (``code_eval``) does so, if ``allowed``."""
    variable = "HF_ALLOW_CODE_EVAL"
    before = os.environ.pop(variable, None)
    if allowed:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


@contextmanager
def bars_on_a_terminal_only() -> Iterator[None]:
    """Within the context, progress bars are silent unless someone is there to see them."""
    original = tqdm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": kwargs.get("disable") or not sys.stderr.isatty()})

    tqdm.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]


def evaluate(
    model: Any,
    tokenizer: Any,
    generative: Sequence[str],
    multiple_choice: Sequence[str],
    *,
    batch_size: int,
    limit: int = 0,
    max_new_tokens: int = 0,
    allow_code: bool = False,
) -> Scores:
    """Score a model on tasks (groups and tags are reported task by task).

    Raises UserError for an unknown task, and for one that runs the model's code unless ``allow_code``.
    """
    from lm_eval import simple_evaluate

    check_tasks([*generative, *multiple_choice], allow_code=allow_code)
    manager = task_manager([*generative, *multiple_choice])
    scores = Scores([], [])
    for kind, tasks in (("generative", generative), ("multiple_choice", multiple_choice)):
        if not tasks:
            continue
        with bars_on_a_terminal_only(), code_execution(allow_code):
            results = simple_evaluate(
                model=lm(model, tokenizer, batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit or None,
                gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens and kind == "generative" else None,
                bootstrap_iters=0,
                log_samples=kind == "generative",
                apply_chat_template=tokenizer.chat_template is not None,
                verbosity="ERROR",
                confirm_run_unsafe_code=allow_code,
            )
        assert results is not None
        scores.rows.extend(rows_of(results, kind))
        scores.by_distance.extend(rows_by_distance(results))
    return scores


def rows_of(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Rows of lm-eval's results: a group that has a figure of its own stands for all its tasks."""
    parts = results.get("group_subtasks", {})
    covered = {
        task
        for group in parts
        if _main_metric(results["results"].get(group, {}))
        for task in _descendants(parts, group)
    }
    rows: list[dict[str, Any]] = []
    for task, figures in results["results"].items():
        metric = _main_metric(figures)
        if metric is None or task in covered:  # a mere heading, or already in its group's figure
            continue
        leaves = [each for each in _descendants(parts, task) if not parts.get(each)] or [task]
        count = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
        name = _name(task) if kind == "generative" else task
        rows.append(
            {"task": name, "kind": kind, "metric": metric.split(",")[0], **_share(float(figures[metric]), count)}
        )
    return rows


def rows_by_distance(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of task, distance, value, stderr, n, from the samples that lm-eval logged of its documents: of each
    task whose documents carry a whole number ``distance``, by its own metric, in ascending order."""
    rows: list[dict[str, Any]] = []
    for task, samples in results.get("samples", {}).items():
        metric, _, of = (_main_metric(results["results"].get(task, {})) or "").partition(",")
        values: dict[int, list[float]] = {}
        for sample in samples:
            distance = sample["doc"].get("distance")
            if metric in sample and sample["filter"] == of and isinstance(distance, int):
                values.setdefault(distance, []).append(float(sample[metric]))
        for distance, each in sorted(values.items()):
            share = _share(sum(each) / len(each), len(each))
            rows.append({"task": _name(task), "distance": distance, **share})
    return rows


def _name(task: str) -> str:
    """How a generative task is called in a record: ``add`` for ``embedded_add``."""
    return task.removeprefix("embedded_")


def _share(value: float, count: int) -> dict[str, Any]:
    """A fraction of ``count`` questions with its plain standard error (0 at 0 and at 1, whatever the count)."""
    return {"value": value, "stderr": (value * (1 - value) / count) ** 0.5, "n": count}


def _descendants(parts: dict[str, list[str]], task: str) -> list[str]:
    """All tasks and groups below a group."""
    return [each for child in parts.get(task, []) for each in (child, *_descendants(parts, child))]


def _main_metric(figures: dict[str, Any]) -> str | None:
    """The key of the task's own metric, in lm-eval's form ``metric,filter``."""
    for wanted in ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc"):
        for key, value in figures.items():
            if key.split(",")[0] == wanted and isinstance(value, (int, float)):
                return str(key)
    return None
