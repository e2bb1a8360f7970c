"""Decoding a batch whose rows do not know of one another: each draws and ends by itself.

B = sequences a batch, P = tokens of its longest prompt, V = vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from distill.errors import UserError
from eval.answers import Reasoning, cut

TAIL = 8  # tokens beyond a stop string's own length in which it is looked for: it may be tokenised in another way


@dataclass(frozen=True)
class Ask:
    """One sample of one question: its prompt as text and tokens, and how it is to be generated."""

    task: str
    question: int
    sample: int
    text: str
    ids: list[int]
    stops: tuple[str, ...]
    room: int
    """Most new tokens."""
    temperature: float
    top_p: float
    reasoning: Reasoning


class Draw(LogitsProcessor):
    """Makes greedy decoding draw: of each row the token that its own numbers choose is left, at the row's temperature
    (0: the likeliest). ``names`` says which question a row is, for the message that non-finite logits end in."""

    def __init__(self, asks: Sequence[Ask], seed: int, unknown: list[int], name: str) -> None:
        self.asks, self.name = asks, name
        self.unknown = torch.tensor(unknown, dtype=torch.long)
        self.numbers = [random.Random(f"{seed}/{ask.task}/{ask.question}/{ask.sample}") for ask in asks]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [B, V] -> the same, with one token left in rows that are drawn."""
        finite = torch.isfinite(scores).all(-1)
        if not bool(finite.all()):
            ask = self.asks[int((~finite).nonzero()[0])]
            raise not_finite(self.name, ask.task, ask.question)
        scores = scores.float()
        if len(self.unknown):
            scores = scores.index_fill(1, self.unknown.to(scores.device), -math.inf)
        places = [row for row, ask in enumerate(self.asks) if ask.temperature]
        if not places:
            return scores
        rows = torch.tensor(places, device=scores.device)
        drawn = torch.tensor([self.numbers[row].random() for row in places], device=scores.device)
        heat = torch.tensor([self.asks[row].temperature for row in places], device=scores.device)
        kept = torch.tensor([self.asks[row].top_p for row in places], device=scores.device)
        shares, tokens = (scores[rows] / heat[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = shares.cumsum(-1) - shares  # the mass of the likelier tokens
        shares = shares * (below < kept[:, None])
        chosen = (shares.cumsum(-1) <= (drawn * shares.sum(-1))[:, None]).sum(-1, keepdim=True)
        chosen = chosen.minimum((shares > 0).sum(-1, keepdim=True) - 1)
        only = torch.full_like(scores[rows], -math.inf).scatter_(1, tokens.gather(1, chosen), 0.0)
        return scores.index_copy(0, rows, only)


class Done(StoppingCriteria):
    """Which rows have ended: at a stop string behind the reasoning, or with no room left."""

    def __init__(self, asks: Sequence[Ask], tokenizer: Any, width: int) -> None:
        self.asks, self.tokenizer, self.width = asks, tokenizer, width
        self.done = [False] * len(asks)
        self.tails = [
            max((len(tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in ask.stops), default=0) + TAIL
            for ask in asks
        ]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """``input_ids`` [B, P + new] -> [B]."""
        new = input_ids.shape[1] - self.width
        for row, ask in enumerate(self.asks):
            if self.done[row] or new >= ask.room:
                self.done[row] = True
            elif ask.stops:
                ids = input_ids[row, self.width :].tolist()
                if cut(self.tokenizer.decode(ids[-self.tails[row] :]), ask.stops)[1]:
                    behind = ask.reasoning.behind(self.tokenizer.decode(ids), ask.text)
                    self.done[row] = cut(behind or "", ask.stops)[1]
        return torch.tensor(self.done, device=input_ids.device)


def not_finite(name: str, task: str, question: int) -> UserError:
    """What non-finite logits end in."""
    return UserError(
        f"{name} gives logits that are not finite (NaN or infinite) in task '{task}', question {question}: its weights "
        "have diverged, or dtype is too narrow for them\n"
        "try dtype=float32, or measure an earlier checkpoint; what was measured stands"
    )
