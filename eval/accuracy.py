"""Accuracy through lm-eval: generative and multiple-choice tasks, each figure with its standard error.

lm-eval makes the questions and matches the answers; `eval.lm` answers them. With k samples of a question its score is
the mean over them (pass@1), and the standard error is that of the mean over questions, each with its samples as one.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.config import MeasureConfig
from distill.data.families import DISTANCES
from distill.errors import UserError
from eval import local_data
from eval.suites import KINDS, check_tasks, leaves, named, task_manager

LINE = 110
"""Columns of a terminal that a line of `Scores.lines` may fill before it is folded."""
FEW_SHOT_SEED = 1234
"""Of the examples before a question, as lm-eval has it: the same for every model."""
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


def check(options: MeasureConfig) -> None:
    """Raise UserError for tasks that could not be measured: unknown, scored in the other way, without their packages or
    data, running code without consent; and for a sampling that could not be."""
    for kind in KINDS:
        check_tasks(getattr(options, kind), kind, allow_code=options.allow_code_execution)
    if options.samples > 1 and not options.temperature:
        raise UserError(
            f"measure.samples={options.samples} at measure.temperature=0 would be the same answer each time: "
            "set a temperature, such as 0.6"
        )
    if not 0 < options.top_p <= 1:
        raise UserError(f"measure.top_p={options.top_p} must be in (0, 1]")
    tasks = [*options.generative, *options.multiple_choice]
    for name in options.few_shot:
        if name not in tasks:
            raise UserError(f"measure.few_shot.{name}: not among the tasks ({', '.join(tasks)})")
    check_data([(name, kind) for kind in KINDS for name in getattr(options, kind)], options.local_data)


def check_data(tasks: Sequence[tuple[str, str]], root: str) -> None:
    """Raise UserError where the data of a task, given with its kind, are not to be had."""
    inner = [named(name, kind) for name, kind in tasks]
    index = task_manager(inner).task_index
    local_data.check((leaf for name in inner for leaf in leaves(index, name)), root)


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


def load_tasks(name: str, kind: str, root: str, few_shot: int | None = None, tokenizer: str = "") -> dict[str, Any]:
    """A task, group or tag as lm-eval's ``tasks``, ``groups`` and ``group_map``, its data from below ``root`` or the
    hub, each task with ``few_shot`` examples (None: as it says), always the same ones."""
    inner = named(name, kind)
    random.seed(0)  # GPQA shuffles its choices when it is loaded
    np.random.seed(1234)
    manager = task_manager([inner])
    if tokenizer:
        manager._factory._meta["pretrained"] = tokenizer  # RULER makes texts of so many tokens
    with bars_on_a_terminal_only(), local_data.reading(root):
        loaded: dict[str, Any] = manager.load([inner])
    for task in loaded["tasks"].values():
        count = few_shot if few_shot is not None else task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=count)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def evaluate(
    model: Any,
    tokenizer: Any,
    options: MeasureConfig,
    *,
    seed: int = 0,
    name: str = "the model",
    report: Callable[[str], None] = print,
    done: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Callable[[str, dict[str, Any]], None] = lambda task, record: None,
) -> Scores:
    """Score a model on the tasks of ``options`` (groups and tags are reported task by task).

    Args:
        seed: with it and the same options the same answers are drawn. name: what messages call the model.
        report: told a line when a batch is halved. done: records of tasks that need not be scored again.
        keep: called with (kind/task, record) as each task is done.

    Raises UserError as ``check`` does, and for logits that are not finite.
    """
    check(options)
    scores = Scores()
    for kind in KINDS:
        for task in getattr(options, kind):
            key = f"{kind}/{task}"
            record = (done or {}).get(key)
            if record is None:
                record = _score(model, tokenizer, task, kind, options, seed, name, report).record
                keep(key, record)
            scores.rows.extend(record["accuracy"])
            scores.by_distance.extend(record["by_distance"])
    return scores


def _score(
    model: Any, tokenizer: Any, task: str, kind: str, options: MeasureConfig, seed: int, name: str,
    report: Callable[[str], None],
) -> Scores:  # fmt: skip
    """The scores of one task, group or tag."""
    from lm_eval import evaluator

    from eval.answers import Reasoning
    from eval.lm import LM, Sampling

    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        samples=options.samples if kind == "generative" else 1,
        max_new_tokens=options.max_new_tokens,
        seed=seed,
        reasoning=Reasoning(options.reasoning_start, options.reasoning_end),
    )
    lm = LM(model, tokenizer, options.batch_size, sampling, name, report)
    passes: list[dict[str, Any]] = []
    with bars_on_a_terminal_only(), code_execution(options.allow_code_execution):
        loaded = load_tasks(
            task, kind, options.local_data, options.few_shot.get(task), getattr(tokenizer, "name_or_path", "")
        )
        lm.whole = {leaf for leaf, each in loaded["tasks"].items() if _metadata(each).get("reads_reasoning")}
        for lm.sample in range(sampling.samples):
            found = evaluator.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=options.limit or None,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=tokenizer.chat_template is not None,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=options.allow_code_execution,
            )
            assert found is not None
            passes.append(found)
    even = {group for group, each in loaded.get("groups", {}).items() if not _by_size(each)}
    by_distance = rows_by_distance(passes) if kind == "generative" else []
    return Scores(rows_of(passes, kind, lm.tally.of, even), by_distance)


def rows_of(
    passes: Sequence[Mapping[str, Any]],
    kind: str,
    counts: Callable[[list[str]], dict[str, int]] = lambda tasks: {},
    even: set[str] = frozenset(),  # type: ignore[assignment]
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


def _metadata(task: Any) -> dict[str, Any]:
    return task.config.metadata or {}


def _by_size(group: Any) -> bool:
    """Whether lm-eval weights the tasks of a group by their questions."""
    return all(metric.weight_by_size for metric in group.aggregate_metric_list or ())
