"""Requests of lm-eval's multiple-choice tasks, prepared once for an importance score's many evaluations."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

from distill.errors import UserError
from distill.likelihood import Request, Requests
from eval.accuracy import bars_on_a_terminal_only, task_manager
from eval.lm import lm as lm_of


def prepare(task: str, tokenizer: Any, model: Any, questions: int = 0, batch_size: int = 1) -> Requests:
    """Build the requests of an lm-eval multiple-choice task (``questions`` of them, the tasks of
    a group in turn; 0: all).

    Raises UserError for an unknown task, or one that is not multiple choice.
    """
    from lm_eval.tasks import get_task_dict

    manager = task_manager([task])
    lm = lm_of(model, tokenizer, batch_size)
    chat = tokenizer.chat_template is not None
    requests: list[Request] = []
    gold: list[int] = []
    leaves: list[range] = []
    for each in _flatten(get_task_dict([task], manager)):
        if each.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"task '{task}' is {each.OUTPUT_TYPE}; importance scores need a multiple-choice task")
        with bars_on_a_terminal_only():
            each.build_all_requests(
                limit=None,
                apply_chat_template=chat,
                chat_template=lm.apply_chat_template if chat else None,
                tokenizer_name=lm.tokenizer_name if chat else "",
            )
        first = len(gold)
        docs = {instance.doc_id: instance.doc for instance in each.instances}
        place = {doc_id: first + i for i, doc_id in enumerate(sorted(docs))}
        gold += [_gold(each, docs[doc_id]) for doc_id in sorted(docs)]
        leaves.append(range(first, len(gold)))
        for instance in each.instances:
            context, continuation = lm._encode_pair(*instance.args)
            requests.append(
                Request(place[instance.doc_id], instance.idx, tuple(context + continuation), len(continuation))
            )
    if not gold:
        raise UserError(f"task '{task}' has no questions")
    turns = [question for turn in zip_longest(*leaves) for question in turn if question is not None]
    kept = {question: place for place, question in enumerate(sorted(turns[: questions or None]))}
    return Requests(
        tuple(replace(r, question=kept[r.question]) for r in requests if r.question in kept),
        tuple(gold[question] for question in kept),
    )


def _gold(task: Any, doc: Any) -> int:
    """Index of the right choice, which some tasks give as its text."""
    target = task.doc_to_target(doc)
    return target if isinstance(target, int) else int(task.doc_to_choice(doc).index(target))


def _flatten(tasks: Any) -> list[Any]:
    """Leaf tasks of lm-eval's nested dict of groups."""
    leaves: list[Any] = []
    for value in tasks.values():
        leaves += _flatten(value) if isinstance(value, dict) else [value]
    return leaves
