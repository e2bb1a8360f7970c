"""Accuracy through lm-eval: generative and multiple-choice tasks, each figure with its standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.errors import UserError, nearest
from eval.backends import hf


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
) -> list[dict[str, Any]]:
    """Score a model on tasks (groups and tags are reported task by task).

    Returns:
        Rows of task, kind, metric, value, stderr, n.
    """
    from lm_eval import simple_evaluate

    manager = task_manager([*generative, *multiple_choice])
    rows: list[dict[str, Any]] = []
    for kind, tasks in (("generative", generative), ("multiple_choice", multiple_choice)):
        if not tasks:
            continue
        with bars_on_a_terminal_only():
            results = simple_evaluate(
                model=hf.lm(model, tokenizer, batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit or None,
                gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens and kind == "generative" else None,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=tokenizer.chat_template is not None,
                verbosity="ERROR",
            )
        assert results is not None
        rows += rows_of(results, kind)
    return rows


def rows_of(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Rows of lm-eval's results: a group that has a figure of its own stands for all its tasks."""
    parts = results.get("group_subtasks", {})
    covered = {
        task
        for group in parts
        if _main_metric(results["results"].get(group, {}))[0]
        for task in _descendants(parts, group)
    }
    rows: list[dict[str, Any]] = []
    for task, figures in results["results"].items():
        metric, value = _main_metric(figures)
        if metric is None or task in covered:  # a mere heading, or already in its group's figure
            continue
        leaves = [each for each in _descendants(parts, task) if not parts.get(each)] or [task]
        count = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
        rows.append(
            {
                "task": task.removeprefix("embedded_") if kind == "generative" else task,
                "kind": kind,
                "metric": metric,
                "value": value,
                "stderr": (value * (1 - value) / count) ** 0.5,
                "n": count,
            }
        )
    return rows


def _descendants(parts: dict[str, list[str]], task: str) -> list[str]:
    """All tasks and groups below a group."""
    return [each for child in parts.get(task, []) for each in (child, *_descendants(parts, child))]


def _main_metric(figures: dict[str, Any]) -> tuple[str | None, float]:
    """The task's own metric: lm-eval's keys are ``metric,filter``."""
    for wanted in ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc"):
        for key, value in figures.items():
            if key.split(",")[0] == wanted and isinstance(value, (int, float)):
                return wanted, float(value)
    return None, 0.0
