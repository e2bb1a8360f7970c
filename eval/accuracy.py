"""Accuracy through lm-eval: generative and multiple-choice tasks, each figure with its standard error.

lm-eval makes the questions and matches the answers, `eval.lm` answers them, `eval.scores` reads the results.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.config import MeasureConfig
from distill.errors import UserError
from eval import local_data
from eval.scores import Scores, rows_by_distance, rows_of
from eval.suites import KINDS, check_tasks, leaves, named, task_manager

FEW_SHOT_SEED = 1234
"""Of the examples before a question, as lm-eval has it: the same for every model."""


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


def _metadata(task: Any) -> dict[str, Any]:
    return task.config.metadata or {}


def _by_size(group: Any) -> bool:
    """Whether lm-eval weights the tasks of a group by their questions."""
    return all(metric.weight_by_size for metric in group.aggregate_metric_list or ())
