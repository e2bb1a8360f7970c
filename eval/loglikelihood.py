"""Requests of lm-eval's multiple-choice tasks, prepared once for an importance score's many evaluations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.errors import UserError
from distill.likelihood import Request, Requests
from eval.accuracy import bars_on_a_terminal_only, load_tasks

SUBSET = "subset"
"""Seed of which questions are taken: one for all runs, so that their scores can be compared."""


def prepare(
    task: str,
    tokenizer: Any,
    model: Any,
    questions: int = 0,
    batch_size: int = 1,
    *,
    few_shot: int | None = None,
    local_data: str = "",
) -> Requests:
    """Build the requests of an lm-eval multiple-choice task (``questions`` of them; 0: all).

    Of a real suite the questions are drawn over its tasks (MMLU's subjects) by their sizes, always the same ones; those
    of the embedded suite, every beginning of which is as varied, are its first. Each has ``few_shot`` examples before
    it (None: as the task says), the same as in lm-eval.

    Raises UserError for an unknown task, or one that is not multiple choice.
    """
    from eval.lm import LM

    lm = LM(model, tokenizer, batch_size)
    chat = tokenizer.chat_template is not None
    loaded = list(load_tasks(task, "multiple_choice", local_data, few_shot)["tasks"].values())
    for each in loaded:
        if each.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"task '{task}' is {each.OUTPUT_TYPE}; importance scores need a multiple-choice task")
    sizes = [len(each.eval_docs) for each in loaded]
    if not sum(sizes):
        raise UserError(f"task '{task}' has no questions")
    taken = first(sizes, questions) if task.startswith("embedded_") else drawn(sizes, questions, task)
    requests: list[Request] = []
    gold: list[int] = []
    for each, chosen in zip(loaded, taken, strict=True):
        if not chosen:
            continue
        with bars_on_a_terminal_only():
            each.build_all_requests(
                samples=chosen,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                chat_template=lm.apply_chat_template if chat else None,
                tokenizer_name=lm.tokenizer_name if chat else "",
            )
        start = len(gold)
        docs = {instance.doc_id: instance.doc for instance in each.instances}
        place = {doc_id: start + i for i, doc_id in enumerate(sorted(docs))}
        gold += [_gold(each, docs[doc_id]) for doc_id in sorted(docs)]
        for instance in each.instances:
            context, continuation = lm._encode_pair(*instance.args)
            whole = (context + continuation)[-lm.max_length - 1 :]  # cut on the left, as in lm-eval
            requests.append(Request(place[instance.doc_id], instance.idx, tuple(whole), len(continuation)))
    return Requests(tuple(requests), tuple(gold))


def prepare_all(
    tasks: Sequence[str], tokenizer: Any, model: Any, questions: int = 0, *, local_data: str = ""
) -> Requests:
    """The requests of several tasks together, ``questions`` (0: all) shared equally among them."""
    requests: list[Request] = []
    gold: list[int] = []
    for place, task in enumerate(tasks):
        share = questions * (place + 1) // len(tasks) - questions * place // len(tasks)
        if questions and not share:
            continue
        part = prepare(task, tokenizer, model, share, local_data=local_data)
        requests += [replace(request, question=request.question + len(gold)) for request in part.requests]
        gold += part.gold
    return Requests(tuple(requests), tuple(gold))


def first(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The first ``count`` (0: all) questions of tasks of these sizes, the tasks in turn: their places in each."""
    turns = sorted((place, task) for task, size in enumerate(sizes) for place in range(size))[: count or None]
    return [sorted(place for place, at in turns if at == task) for task in range(len(sizes))]


def drawn(sizes: Sequence[int], count: int, name: str) -> list[list[int]]:
    """``count`` (0: all) questions of tasks of these sizes: of each its share, the largest remainders rounded up, drawn
    with a seed that follows from ``name`` alone: their places in each task."""
    total = sum(sizes)
    if not 0 < count < total:
        return [list(range(size)) for size in sizes]
    shares = [count * size // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda task: (-(count * sizes[task] % total), task))
    for task in remainders[: count - sum(shares)]:
        shares[task] += 1
    return [
        sorted(random.Random(f"{SUBSET}/{name}/{task}").sample(range(size), share))
        for task, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]


def _gold(task: Any, doc: Any) -> int:
    """Index of the right choice, which some tasks give as its text."""
    target = task.doc_to_target(doc)
    return target if isinstance(target, int) else int(task.doc_to_choice(doc).index(target))
