"""A loaded model as lm-eval asks it: HFLM's likelihoods, and generations of our own.

What a question is answered does not depend on what else is in its batch: batches are padded on the left, and each
sample is drawn with numbers that follow from (seed, task, question, sample) alone. So halving a batch that does not fit
in memory changes no answer. B = sequences a batch, P = tokens of its longest prompt.
"""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from distill.data.boundary import beyond
from distill.data.chat import undated
from distill.data.sample import end_tokens
from distill.errors import UserError, out_of_memory
from eval.answers import Answer, Reasoning, Tally, answer_of
from eval.decoding import Ask, Done, Draw, not_finite

KNOWN = ("until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_new_tokens", "max_tokens")
"""What a task may ask of a generation."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: ``samples`` of each question; at ``temperature`` 0 as each task says (greedily, nearly
    always). ``max_new_tokens`` 0: as each task says."""

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    max_new_tokens: int = 0
    seed: int = 0
    reasoning: Reasoning = field(default_factory=Reasoning)


class LM(HFLM):
    """A loaded model, asked in the tokens that it was trained on: a chat template says itself whether a BOS begins the
    text, and knows no other day than in training.

    Args:
        name: what the model is called in messages. report: told a line when a batch is halved.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        sampling: Sampling | None = None,
        name: str = "the model",
        report: Callable[[str], None] = print,
    ) -> None:
        model.config.use_cache = True
        super().__init__(
            pretrained=model,
            tokenizer=undated(tokenizer),
            batch_size=batch_size,
            device=str(model.device),
            add_bos_token=None if tokenizer.chat_template is None else False,
        )
        self.sampling, self.name, self.report = sampling or Sampling(), name, report
        self.tally = Tally()
        self.sample = 0
        """Which of the samples ``generate_until`` answers with; all are made when the first is asked for."""
        self.whole: set[str] = set()
        """Tasks whose answers keep the reasoning: they read it themselves."""
        self._answers: dict[tuple[str, int, int], Answer] = {}
        self._unknown = beyond(self.tokenizer, model.config.get_text_config().vocab_size)
        self._asked: list[tuple[str, int]] = []
        self._special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request: the text behind the reasoning, before the first stop string."""
        copies = Counter[tuple[str, int]]()
        keys = []
        for request in requests:
            question = (request.task_name, request.doc_id)
            keys.append((*question, self.sample * request.repeats + copies[question]))
            copies[question] += 1
        asks = []
        for request, (task, question, sample) in zip(requests, keys, strict=True):
            for each in range(self.sampling.samples):
                place = sample + each * request.repeats
                if (task, question, place) not in self._answers and self.sample == 0:
                    asks.append(self._ask(request, task, question, place))
        self._generate_all(asks)
        return [self._answers[key].text for key in keys]

    def _ask(self, request: Any, task: str, question: int, sample: int) -> Ask:
        """A request as it is generated: what the config sets, over what the task says, within the model's window."""
        text, wanted = request.args
        if unknown := wanted.keys() - set(KNOWN):
            raise UserError(
                f"task '{task}' asks for the generation option '{min(unknown)}', which is not measured here; "
                f"allowed: {', '.join(KNOWN)}"
            )
        until = wanted.get("until") or []
        most = next((wanted[key] for key in KNOWN[-3:] if wanted.get(key)), self.max_gen_toks)
        most = self.sampling.max_new_tokens or int(most)
        ids = self.tok_encode(text)
        if len(ids) >= self.max_length:
            self.tally.prompts[task] += sample == 0
            ids = ids[1 - self.max_length :]
        sampled = self.sampling if self.sampling.temperature else None
        own = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
        return Ask(
            task,
            question,
            sample,
            text,
            ids,
            (until,) if isinstance(until, str) else tuple(until),
            min(most, self.max_length - len(ids)),
            sampled.temperature if sampled else own,
            sampled.top_p if sampled else float(wanted.get("top_p") or 1.0),
            Reasoning() if task in self.whole else self.sampling.reasoning,
        )

    def _generate_all(self, asks: list[Ask]) -> None:
        """Answer all, the longest prompts first; a batch that does not fit in memory is halved, and stays so."""
        asks = sorted(asks, key=lambda ask: (-len(ask.ids), ask.room, ask.task, ask.question, ask.sample))
        bar = tqdm(total=len(asks), desc="generating", leave=False)
        while asks:
            batch = asks[: self.batch_size]
            try:
                answers = self._generate(batch)
            except (RuntimeError, MemoryError) as error:
                self._halve(error, len(batch), f"generating for task '{batch[0].task}'")
                continue
            for ask, answer in zip(batch, answers, strict=True):
                self._answers[ask.task, ask.question, ask.sample] = answer
                self.tally.add(ask.task, answer)
            asks = asks[len(batch) :]
            bar.update(len(batch))
        bar.close()

    def _halve(self, error: Exception, size: int, doing: str) -> None:
        """Go on with half the batch that ran out of memory; raises ``error`` where it was something else, or one."""
        if not out_of_memory(error) or size == 1:
            raise error
        self.batch_size_per_gpu = max(size // 2, 1)
        self.report(f"  {self.name}: out of memory {doing}: batch {size} -> {self.batch_size_per_gpu}")
        error.__traceback__ = None  # it holds what did not fit
        gc.collect()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def _generate(self, batch: list[Ask]) -> list[Answer]:
        """Answers to one batch [B, P], padded on the left."""
        ends = end_tokens(self.model, self.tokenizer)
        width = max(len(ask.ids) for ask in batch)
        ids = torch.full((len(batch), width), ends[0])
        mask = torch.zeros_like(ids)
        for row, ask in enumerate(batch):
            ids[row, width - len(ask.ids) :] = torch.tensor(ask.ids)
            mask[row, width - len(ask.ids) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(ask.room for ask in batch),
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            do_sample=False,
        )
        own, self.model.generation_config = self.model.generation_config, config  # generate fills gaps from it
        try:
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([Draw(batch, self.sampling.seed, self._unknown, self.name)]),
                stopping_criteria=StoppingCriteriaList([Done(batch, self.tokenizer, width)]),
            )
        finally:
            self.model.generation_config = own
        rows = output[:, width:].tolist()
        return [self._read(ask, row[: ask.room], ends) for ask, row in zip(batch, rows, strict=True)]

    def _read(self, ask: Ask, ids: list[int], ends: list[int]) -> Answer:
        """What a row says; special tokens are left out, but not before the marks of the reasoning have been found."""
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        marked = not {ask.reasoning.start, ask.reasoning.end}.isdisjoint(self._special)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=not marked)
        answer = answer_of(text, ask.stops, ask.reasoning, prompt=ask.text, ended=length < len(ids))
        if not marked:
            return answer
        return replace(answer, text=re.sub("|".join(map(re.escape, self._special)), "", answer.text))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation; prompts that do not fit are cut on the left and counted."""
        asked = self._asked if len(self._asked) == len(requests) else [("", 0)] * len(requests)
        sizes = [len(context) + len(continuation) for _, context, continuation in requests]
        cut_short = {key for key, size in zip(asked, sizes, strict=True) if size > self.max_length + 1}
        self.tally.prompts.update(task for task, _ in cut_short)
        while True:
            try:
                found = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
                break
            except (RuntimeError, MemoryError) as error:
                self._halve(error, self.batch_size, "scoring choices")
        for (task, question), (value, _) in zip(asked, found, strict=True):
            if not math.isfinite(value):
                raise not_finite(self.name, task, question)
        return found
