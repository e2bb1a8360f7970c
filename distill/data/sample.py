"""Traces sampled from a model: prompts to batches, batches to completions, and which completions are kept.

Legend: B = sequences a batch, P = tokens of its longest prompt, N = most new tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from distill.data.boundary import beyond
from distill.data.chat import undated
from distill.data.prompts import Prompt, is_correct, key_of
from distill.errors import UserError

TRUNCATED, SHORT, WRONG, DUPLICATE = "truncated", "too short", "wrong answer", "duplicate"


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens of that mass."""

    samples: int = 1
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch_size: int = 32
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for values that nothing could be sampled with."""
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{_option(name)} {getattr(self, name)} must be above 0")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be in (0, 1]")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be at least 0")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"--samples {self.samples} at --temperature 0 would be the same trace each time")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it: its index in the source, its text, its token ids."""

    source: int
    prompt: Prompt
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Completion:
    """What a model said: its text and number of tokens (the end token not among them), and whether it ended."""

    text: str
    tokens: int
    ended: bool


def render(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Question]:
    """Render prompts by the chat template, ready for the assistant; without a template a plain prompt is taken as is.

    Raises UserError where a prompt cannot be rendered.
    """
    tokenizer = undated(tokenizer)
    bare = tokenizer.chat_template is None
    questions = []
    for source, prompt in enumerate(prompts):
        if bare and not prompt.plain:
            raise UserError(
                f"{prompt.where}: the teacher's tokenizer has no chat template, which messages need: "
                "give prompt, a text"
            )
        try:
            text = (
                prompt.messages[0]["content"]
                if bare
                else tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            raise UserError(f"{prompt.where}: the teacher's chat template refuses it: {error}") from error
        questions.append(Question(source, prompt, text, tokenizer(text, add_special_tokens=bare)["input_ids"]))
    return questions


def trace(tokenizer: Any, question: Question, completion: str) -> dict[str, Any]:
    """A trace as a row of training data: ``messages`` where the chat template renders the completion as it stands.

    Otherwise (a template that drops the reasoning, or none) the rendered ``prompt`` and the ``completion``, so that
    training reads what the model read and said.
    """
    if tokenizer.chat_template is not None:
        chat = [*question.prompt.messages, {"role": "assistant", "content": completion}]
        if undated(tokenizer).apply_chat_template(chat, tokenize=False).startswith(question.text + completion):
            return {"messages": chat}
    return {"prompt": question.text, "completion": completion}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion; UserError where the model has none."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or ())
    if not found:
        raise UserError("the teacher has no end token: its completions would never end")
    return sorted(found)


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, batch: int
) -> list[Completion]:
    """One completion of each of B prompts (token ids), which depend on (``sampling.seed``, ``batch``) alone.

    The batch [B, P] is padded on the left. The model's own generation defaults are not used, its end tokens are. Ids
    that the tokenizer does not know (a vocabulary padded beyond it) are never drawn.
    """
    ends = end_tokens(model, tokenizer)
    width = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), ends[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
        use_cache=True,
        suppress_tokens=beyond(tokenizer, model.config.get_text_config().vocab_size) or None,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    own, model.generation_config = model.generation_config, config  # generate fills gaps from the model's own
    try:
        torch.manual_seed(random.Random(f"traces/{sampling.seed}/{batch}").getrandbits(32))
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    finally:
        model.generation_config = own
    completions = []
    for row in output[:, width:].tolist():
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        completions.append(Completion(text, length, length < len(row)))
    return completions


class Sieve:
    """Decides which completions are kept, in order, and counts the others by reason.

    Args:
        min_tokens: fewer make a completion too short. keep_wrong: keep answers that are not the expected one.
    """

    def __init__(self, min_tokens: int, keep_wrong: bool) -> None:
        self.min_tokens, self.keep_wrong = min_tokens, keep_wrong
        self.kept, self.rejected = 0, Counter[str]()
        self.judged, self.right = 0, 0
        self._seen: set[Any] = set()

    def take(self, question: Question, completion: Completion) -> tuple[bool, bool | None]:
        """(whether it is kept, whether it is correct); None where no answer is known."""
        correct = None
        if question.prompt.answer is not None:
            correct = completion.ended and is_correct(completion.text, question.prompt.answer)
            self.judged += 1
            self.right += correct
        key = key_of(question.prompt.messages, completion.text)
        reason = ""
        if not completion.ended:
            reason = TRUNCATED
        elif completion.tokens < self.min_tokens:
            reason = SHORT
        elif correct is False and not self.keep_wrong:
            reason = WRONG
        elif key in self._seen:
            reason = DUPLICATE
        if reason:
            self.rejected[reason] += 1
            return False, correct
        self._seen.add(key)
        self.kept += 1
        return True, correct
