"""A hybrid in llama.cpp's formats: size, memory, speed, accuracy and distance to the unquantised model, per format; and
what each component loses when it alone is quantised.

    python benchmarks/quantize.py runs/wide --json docs/quantize.json --doc docs/export.md --name wide
    python benchmarks/quantize.py --random 1024x12 --types Q8_0,Q4_K_M --doc docs/export.md --name random

RUN or CHECKPOINT, a ``mamba2`` hybrid. Each file is measured in a process of its own. KL is KL(unquantised || quantised)
in nats a token over held-out documents, `agree` how often both put the same token first; accuracy is the mean of the five
generative families (greedy, exact match); memory is what the process grows by from before the model is opened to the
end. --random has random weights instead: size, memory and speed of a larger model, whose accuracy means nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from distill.data.families import FAMILIES
from distill.data.suite import generative
from distill.data.traces import EmbeddedTraces

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,IQ3_M"
LENGTH = 128
PROMPT, NEW = 512, 64
"""Tokens of the prompt that prefill is timed on, and decoding steps behind it."""
LONGEST = 96  # tokens of the longest right completion, and some
F32 = 0
"""ggml's number of the type, for keys and values."""


def open_model(path: Path, context: int, threads: int, *, logits: bool) -> Any:
    """A GGUF in llama.cpp, keys and values in float32."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=context, logits_all=logits, n_threads=threads, n_threads_batch=threads,
        type_k=F32, type_v=F32, verbose=False,
    )  # fmt: skip


def documents(tokenizer: Any, tokens: int) -> list[list[int]]:
    """Held-out documents of about so many tokens together."""
    rows = EmbeddedTraces(tokenizer, -(-tokens // LENGTH), LENGTH, dict.fromkeys(FAMILIES, 1.0), 90_001, held_out=True)
    found: list[list[int]] = []
    for row in rows:
        ids, starts = row["input_ids"].tolist(), [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), LENGTH]
        parts = [ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        found += [part for part in parts if any(part) and len(part) > 1]  # the rest of a row is padding
    return found


def log_probabilities(path: Path, texts: Sequence[list[int]], threads: int) -> np.ndarray:
    """Of every next token of every document, in float32 [N, V]."""
    model = open_model(path, LENGTH, threads, logits=True)
    found = []
    for ids in texts:
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        found.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32))
    model.close()
    return np.concatenate(found)


def accuracy(path: Path, tokenizer: Any, questions: int, threads: int) -> float:
    """Mean accuracy of the families, greedy, exact match behind the reasoning."""
    model = open_model(path, 4 * LENGTH, threads, logits=False)
    shares = []
    for family in FAMILIES:
        right = 0
        asked = generative(family, questions)
        for question in asked:
            chat = [{"role": "user", "content": question["prompt"]}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            model.reset()
            made: list[int] = []
            for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
                if token == tokenizer.eos_token_id or len(made) == LONGEST:
                    break
                made.append(token)
            text = tokenizer.decode(made, skip_special_tokens=True)
            right += text.split("</think>")[-1].strip() == question["answer"]
        shares.append(right / len(asked))
    model.close()
    return statistics.mean(shares)


def speed(path: Path, threads: int, repeats: int) -> dict[str, float]:
    """Tokens a second of prefill and of decoding one sequence, medians; and what the process grew by, in MiB."""
    before = resident()
    model = open_model(path, PROMPT + NEW + 8, threads, logits=False)
    prompt = [5 + i % 50 for i in range(PROMPT)]
    fills, steps = [], []
    for _ in range(repeats):
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        fills.append(time.perf_counter() - began)
        for token in range(NEW):
            began = time.perf_counter()
            model.eval([5 + token % 50])
            steps.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model.close()
    return {
        "memory_mib": max(peak, resident()) - before,
        "prefill": PROMPT / statistics.median(fills),
        "decode": 1 / statistics.median(steps),
    }


def resident() -> float:
    """MiB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_one(args: argparse.Namespace) -> None:
    """What the process of one file does: print its figures as JSON."""
    import llama_cpp  # noqa: F401  (its memory is not the model's)

    path = Path(args.one)
    found: dict[str, Any] = speed(path, args.threads, args.repeats) if not args.without_speed else {}
    if args.reference:
        from distill.teacher import load_tokenizer

        tokenizer = load_tokenizer(args.target)
        texts = documents(tokenizer, args.tokens)
        ours = log_probabilities(path, texts, args.threads)
        reference = Path(args.reference)
        if not reference.exists():
            np.save(reference, ours)
        theirs = np.load(reference)
        found["kl"] = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
        found["agree"] = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
        found["tokens"] = len(theirs)
        found["accuracy"] = accuracy(path, tokenizer, args.questions, args.threads)
    print(json.dumps(found))
