"""Accuracy by log-likelihood on prepared multiple-choice requests: what an importance score needs, many times over.

The requests are built and tokenised once; each evaluation is then only forward passes, in batches of similar length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax

from distill.data.boundary import continuation
from distill.data.prompts import Prompt
from distill.data.sample import render
from distill.errors import UserError
from distill.hybrid.model import head_input
from distill.records import fingerprint, write_text


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
        journal: Path | None = None,
    ) -> list[dict[str, float]]:
        """``evaluate`` of every variant of a model, in turn for each batch; a variant makes a context within which
        the model computes something else. ``progress`` is told the share of the tokens that is done. ``journal`` is a
        file that batches are noted in: those that an earlier session noted, of the same variants, are not computed."""
        noted = Journal(journal, fingerprint([asdict(self), batch_tokens, len(variants)]) if journal else "")
        totals: list[list[dict[int, float]]] = [[{} for _ in self.gold] for _ in variants]
        ordered = sorted(self.requests, key=lambda r: len(r.ids))
        tokens, all_tokens = 0, sum(len(r.ids) for r in ordered)
        start = 0
        while start < len(ordered):
            end = start + 1
            while end < len(ordered) and len(ordered[end].ids) * (end + 1 - start) <= batch_tokens:
                end += 1
            batch = ordered[start:end]
            found = noted.values.get(start, [])
            for variant in variants[len(found) :]:
                with variant():
                    found.append(self._score(model, batch))
            noted.add(start, found)
            for total, values in zip(totals, found, strict=True):
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


class Journal:
    """The log-likelihoods of batches, a line each as they come; of what a killed process left, the torn end is dropped.

    Args:
        path: the file, or None: nothing is noted.
        of: what they are of; a file that is of something else is begun anew.
    """

    def __init__(self, path: Path | None, of: str) -> None:
        self.path, self.values = path, dict[int, list[list[float]]]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines[:1] == [of]:
            for line in lines[1:-1]:
                start, values = json.loads(line)
                self.values[start] = values
        write_text(path, "".join(f"{line}\n" for line in [of, *lines[1 : 1 + len(self.values)]]))

    def add(self, start: int, values: list[list[float]]) -> None:
        """Note the batch that begins with request ``start``: a list for every variant."""
        if self.path is not None and start not in self.values:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([start, values]) + "\n")


def check_question(row: Any) -> tuple[str, list[str], int]:
    """(prompt, choices, gold) of a question such as ``{"prompt": "2+2=", "choices": ["4", "5"], "gold": 0}``.

    Raises UserError for a row of another form.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        raise UserError("a question has prompt (a text), choices (texts) and gold (which of them is right, from 0)")
    choices, gold = row.get("choices"), row.get("gold")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise UserError(f"choices={choices!r}: expected a list of at least two texts")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"choices={choices!r}: each must be a text, and not an empty one")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(f"gold={gold!r}: expected which of the {len(choices)} choices is right, from 0")
    return row["prompt"], list(choices), gold


def requests_of(questions: Iterable[Mapping[str, Any]], tokenizer: Any) -> Requests:
    """Requests of questions with ``prompt``, ``choices`` and ``gold``: each choice as what the assistant says, or,
    where the tokenizer has no chat template, as what follows the prompt.

    Raises UserError for a question of another form, and where there is none.
    """
    requests: list[Request] = []
    golds: list[int] = []
    for number, row in enumerate(questions):
        prompt, choices, gold = check_question(row)
        (question,) = render(tokenizer, [Prompt([{"role": "user", "content": prompt}], plain=True)])
        for choice, text in enumerate(choices):
            ids = continuation(tokenizer, text)
            requests.append(Request(number, choice, (*question.ids, *ids), len(ids)))
        golds.append(gold)
    if not golds:
        raise UserError("no questions to score with: give at least one (prompt, choices, gold)")
    return Requests(tuple(requests), tuple(golds))
