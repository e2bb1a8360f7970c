"""Log-likelihood accuracy on prepared requests: what an importance score needs, many times over.

The requests of an lm-eval multiple-choice task are built and tokenised once; each evaluation is then only forward
passes, in batches of similar length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch.nn.functional import log_softmax

from distill.errors import UserError
from distill.hybrid.model import head_input
from eval.accuracy import bars_on_a_terminal_only, task_manager


@dataclass(frozen=True)
class Request:
    """One choice of a question: ids [n], of which the last ``targets`` are scored."""

    question: int
    choice: int
    ids: tuple[int, ...]
    targets: int


@dataclass(frozen=True)
class Requests:
    """Prepared requests of a multiple-choice task; ``gold[q]`` is the right choice of question q."""

    requests: tuple[Request, ...]
    gold: tuple[int, ...]

    def evaluate(self, model: Any, batch_tokens: int = 8192) -> dict[str, float]:
        """accuracy, its stderr, mean log-likelihood of the right answers, and the number of questions."""
        return self.compare(model, [nullcontext], batch_tokens=batch_tokens)[0]

    @torch.no_grad()
    def compare(
        self,
        model: Any,
        variants: Sequence[Callable[[], AbstractContextManager[None]]],
        *,
        batch_tokens: int = 8192,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[dict[str, float]]:
        """``evaluate`` of every variant of a model, in turn for each batch; a variant makes a context within which
        the model computes something else. ``progress`` is told the share of the tokens that is done."""
        totals: list[list[dict[int, float]]] = [[{} for _ in self.gold] for _ in variants]
        ordered = sorted(self.requests, key=lambda r: len(r.ids))
        tokens, all_tokens = 0, sum(len(r.ids) for r in ordered)
        start = 0
        while start < len(ordered):
            end = start + 1
            while end < len(ordered) and len(ordered[end].ids) * (end + 1 - start) <= batch_tokens:
                end += 1
            batch = ordered[start:end]
            for variant, total in zip(variants, totals, strict=True):
                with variant():
                    values = self._score(model, batch)
                for request, value in zip(batch, values, strict=True):
                    total[request.question][request.choice] = value
            start = end
            tokens += sum(len(r.ids) for r in batch)
            progress(tokens / all_tokens)
        return [self._figures(total) for total in totals]

    def _figures(self, totals: list[dict[int, float]]) -> dict[str, float]:
        """Accuracy of the log-likelihoods by question and choice."""
        right = [max(t, key=t.__getitem__) == gold for t, gold in zip(totals, self.gold, strict=True)]
        accuracy = sum(right) / len(right)
        return {
            "accuracy": accuracy,
            "stderr": (accuracy * (1 - accuracy) / len(right)) ** 0.5,
            "loglikelihood": sum(t[g] for t, g in zip(totals, self.gold, strict=True)) / len(right),
            "questions": float(len(right)),
        }

    @staticmethod
    def _score(model: Any, batch: list[Request]) -> list[float]:
        """Sum of log-probabilities of each request's targets. Padding is on the right, so that no real token
        sees it under a causal mixer."""
        width = max(len(r.ids) for r in batch)
        ids = torch.tensor([[*r.ids, *[0] * (width - len(r.ids))] for r in batch], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        for row, r in enumerate(batch):
            keep[row, len(r.ids) - r.targets - 1 : len(r.ids) - 1] = True
        keep = keep.to(model.device)
        logits = model.lm_head(head_input(model, hidden[keep])).float()
        targets = ids[:, 1:][keep[:, :-1]]
        values = log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1).cpu()
        return [float(part.double().sum()) for part in values.split([r.targets for r in batch])]


def prepare(task: str, tokenizer: Any, model: Any, questions: int = 0, batch_size: int = 1) -> Requests:
    """Build the requests of an lm-eval multiple-choice task (``questions`` of them, the tasks of
    a group in turn; 0: all).

    Raises UserError for an unknown task, or one that is not multiple choice.
    """
    from lm_eval.tasks import get_task_dict

    from eval.backends import hf

    manager = task_manager([task])
    lm = hf.lm(model, tokenizer, batch_size)
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
