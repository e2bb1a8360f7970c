"""Which tasks there are: the embedded suite, lm-eval's, and the usual suites by the names that people call them.

A task is checked by its name before any work: that there is such a one, that it is scored in the way in which it is
named, that the packages it needs are here, and whether it runs code that the model writes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from distill.errors import UserError, nearest

KINDS = ("generative", "multiple_choice")
SUITES: dict[str, dict[str, str]] = {
    "mmlu": {"generative": "mmlu_generative", "multiple_choice": "mmlu"},
    "gsm8k": {"generative": "gsm8k"},
    "math500": {"generative": "math500"},
    "aime24": {"generative": "aime24"},
    "aime25": {"generative": "aime25"},
    "amc23": {"generative": "amc23"},
    "gpqa_diamond": {"generative": "gpqa_diamond_cot_zeroshot", "multiple_choice": "gpqa_diamond_zeroshot"},
    "mbpp": {"generative": "mbpp"},
    "humaneval": {"generative": "humaneval"},
    "ifeval": {"generative": "ifeval"},
    "arc": {"generative": "arc_challenge_chat", "multiple_choice": "arc_challenge"},
    "hellaswag": {"multiple_choice": "hellaswag"},
    "ruler": {"generative": "ruler"},
}
"""The usual suites: name -> how it is scored -> lm-eval's name (``math500`` and ``amc23`` are ours, in ``tasks/``)."""
NEEDS: dict[str, tuple[str, ...]] = {
    "ifeval": ("langdetect", "immutabledict", "nltk"),
    "ruler": ("wonderwords", "nltk", "html2text", "bs4"),
}
"""Packages that the Python helpers of a folder of lm-eval's tasks import."""
CALLED = {"bs4": "beautifulsoup4"}


def named(name: str, kind: str) -> str:
    """lm-eval's name of a task that is scored as ``kind``; most are called the same."""
    ways = SUITES.get(name.replace("-", "_"), {})
    if ways and kind not in ways:
        other = next(iter(ways))
        raise UserError(f"task '{name}' is not scored as {kind}: name it under measure.{other}")
    return ways.get(kind, name)


OURS, USUAL, ALL = range(3)
"""How many tasks a manager knows: our own, the folders of the usual suites too, all of lm-eval's."""
FOLDERS = (
    "mmlu/default", "mmlu/generative", "gsm8k", "hendrycks_math", "minerva_math", "aime", "gpqa", "mbpp", "humaneval",
    "ifeval", "arc", "hellaswag", "ruler",
)  # fmt: skip
"""Where lm-eval has the usual suites: reading these takes a second, reading all of its tasks half a minute."""


@cache
def _manager(extent: int) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import tasks

    theirs = [Path(tasks.__file__).parent / folder for folder in FOLDERS] if extent == USUAL else []
    folders = [*theirs, Path(__file__).parent / "tasks"]
    return tasks.TaskManager(include_path=folders, include_defaults=extent == ALL)


def task_manager(names: Sequence[str]) -> Any:
    """An lm-eval task manager that knows ``names``: the smallest that does.

    Raises UserError for a task that none knows, naming the nearest.
    """
    for extent in (OURS, USUAL):
        if all(name in _manager(extent).all_tasks for name in names):
            return _manager(extent)
    everything = _manager(ALL)
    for name in names:
        if name not in everything.all_tasks:
            known = [*SUITES, *_manager(OURS).all_tasks, *everything.all_tasks]
            raise UserError(
                f"unknown task '{name}'{nearest(name, known)}; allowed: the embedded suite (embedded_generative, "
                f"embedded_choice), {', '.join(SUITES)}, and all of lm-eval's tasks"
            )
    return everything


def check_tasks(names: Sequence[str], kind: str, *, allow_code: bool) -> None:
    """Raise UserError for a task that there is none of, that is not scored as ``kind``, whose packages are not here,
    or that runs code which the model wrote (HumanEval, MBPP) where ``allow_code`` does not say that it may."""
    inner = [named(name, kind) for name in names]
    index = task_manager(inner).task_index
    for name, task in zip(names, inner, strict=True):
        for leaf in leaves(index, task):
            inside = "" if leaf.get("task") in (name, task) else f" (in '{name}')"
            _check_kind(leaf, name, inside, kind)
            _check_packages(leaf, name)
            if leaf.get("unsafe_code") and not allow_code:
                raise UserError(
                    f"task '{leaf['task']}'{inside} runs the Python code that the model writes, on this machine and "
                    "with your rights: set measure.allow_code_execution=true if that is safe here (a container), or "
                    "leave it out"
                )


def _check_kind(leaf: dict[str, Any], name: str, inside: str, kind: str) -> None:
    way = leaf.get("output_type")
    if way in ("generate_until", "multiple_choice"):
        other = "generative" if way == "generate_until" else "multiple_choice"
        if other != kind:
            raise UserError(
                f"task '{leaf['task']}'{inside} is {way}, not {kind}: name '{name}' under measure.{other}"
                if kind == "generative" or inside
                else f"task '{name}' is {way}; likelihoods need a multiple-choice task (measure.{other} takes it)"
            )


def _check_packages(leaf: dict[str, Any], name: str) -> None:
    folder = Path(leaf.get("folder", "")).name
    missing = [package for package in NEEDS.get(folder, ()) if util.find_spec(package) is None]
    if missing:
        packages = " ".join(CALLED.get(package, package) for package in missing)
        raise UserError(f"task '{name}' needs packages that are not installed: pip install {packages}")
    if "nltk" in NEEDS.get(folder, ()):
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise UserError(
                f"task '{name}' needs nltk's sentence tables: python -m nltk.downloader punkt_tab (offline: put its "
                "folder tokenizers/punkt_tab where NLTK_DATA points)"
            ) from None


def leaves(index: Any, task: Any) -> Iterator[dict[str, Any]]:
    """The config of every single task in ``task`` (the name of a task, group or tag, or what a group holds in place of
    a name, a mapping), each with the ``folder`` that its file lies in."""
    children: list[Any] = []
    folder = ""
    if isinstance(task, str):
        entry = index.get(task)
        content = (entry.cfg if entry else None) or {}
        children = sorted(entry.tags) if entry and entry.cfg is None else []  # a tag
        folder = str(entry.yaml_path.parent) if entry and getattr(entry, "yaml_path", None) else ""
    else:
        content = task
        if "group" in task and "task" not in task:  # a known group with other values
            children = [task["group"]]
    below = content.get("task")
    if isinstance(below, list):
        children = below
    elif below is not None and isinstance(task, dict) and below in index:  # a known task with other values
        known = next(leaves(index, below), {})
        yield {**known, **content}
        return
    elif below is not None:
        yield {"folder": folder, **content}
    for child in children:
        yield from leaves(index, child)
