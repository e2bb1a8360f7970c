"""Decode throughput: step times over batch and context, models interleaved in one run, and 1-in / N-out.

1-in / N-out throughput = batch * N / sum over t of step_time(t): step times are integrated, never speeds.

Keys of a row, seconds and bytes of the whole batch:

- ``model``, ``batch``, ``context`` (tokens in the cache after the step); ``batch_asked``, where memory did not suffice
- ``step_seconds`` (median) with quartiles ``step_seconds_low`` and ``_high``, ``tokens_per_second`` = batch / median
- ``roofline_seconds``, the operator roofline of the step on this machine; ``roofline_fraction``, the part of it reached
- ``cache_bytes`` = ``kv_bytes`` + ``state_bytes``; ``weight_bytes``; ``overhead_bytes``, what a step needs beside them
  at its peak, measured; ``peak_bytes``, their sum

What a record has beside them (prefill, the second protocol, memory by length): `eval.serving`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from distill.config import ThroughputConfig
from distill.errors import UserError, brief, out_of_memory
from eval.backends import Engine
from eval.backends.hf import Model
from eval.machine import Machine

T = TypeVar("T")
Report = Callable[[str], None]
Times = dict[tuple[str, int], list[float]]
"""(model, context) -> seconds of each repeat."""
Facts = dict[str, tuple[dict[int, dict[str, int]], int]]
"""Model -> bytes of its cache by context, and the overhead of a step."""


def silent(line: str) -> None:
    """Reports nothing."""


def engines_of(models: Mapping[str, Any]) -> dict[str, Engine]:
    """Each model (a transformers model, or an engine already) as an engine."""
    return {name: model if hasattr(model, "prepare") else Model(name, model) for name, model in models.items()}


def machine_of(models: Mapping[str, Any]) -> Machine:
    """The machine that the models are on, measured in their type; measured once a process."""
    first = next(iter(models.values()))
    return Machine.measure(first.device.type, first.dtype)


def contexts_of(options: ThroughputConfig) -> list[int]:
    """The contexts that are timed: those of the config, and the ends of the integral."""
    return sorted({1, options.output_tokens, *options.contexts})


def measure(models: Mapping[str, Any], options: ThroughputConfig, report: Report = silent) -> list[dict[str, Any]]:
    """Time a decode step of every model at every batch and context.

    The models take turns, repeat by repeat, so that a drift of the machine meets all alike. Contexts 1 and
    ``output_tokens`` are added to those of the config, for the integral. Where memory does not suffice, the batch is
    halved for all models, which is reported. In brackets: the part of the roofline that is reached.

    Returns:
        Rows as above.
    """
    engines, machine, contexts = engines_of(models), machine_of(models), contexts_of(options)
    rows: list[dict[str, Any]] = []
    for asked in options.batches:
        batch, measured = halving(
            asked,
            lambda batch: step_rows(engines, dict.fromkeys(engines, batch), contexts, options.repeats, machine),
            report,
        )
        if batch != asked and any(row["batch"] == batch for row in rows):
            continue  # that batch is measured already
        rows += [{**row, "batch_asked": asked} if batch != asked else row for row in measured]
        for context in contexts:
            speeds = [
                f"{row['model']} {row['tokens_per_second']:,.0f} tokens/s ({row['roofline_fraction']:.2f})"
                for row in measured
                if row["context"] == context
            ]
            report(f"batch {batch}, context {context}: {', '.join(speeds)}")
    return rows


def halving(batch: int, run: Callable[[int], T], report: Report) -> tuple[int, T]:
    """``run(batch)``, with half the batch as often as memory does not suffice; UserError where one sequence is too
    much. Returns the batch, too."""
    while True:
        try:
            return batch, run(batch)
        except Exception as error:  # of torch, of numpy or of a backend; anything but memory goes on
            if not out_of_memory(error):
                raise
            if batch == 1:
                raise UserError(
                    f"out of memory even at batch 1: {brief(error, 160)}\n"
                    "lower the contexts or the output tokens, or take a machine with more memory"
                ) from error
        report(f"out of memory at batch {batch}: measuring batch {batch // 2} in its place")
        batch //= 2


def step_rows(
    engines: Mapping[str, Engine], batches: Mapping[str, int], contexts: Sequence[int], repeats: int, machine: Machine
) -> list[dict[str, Any]]:
    """Rows of every engine at its batch: all in memory together and interleaved step by step, or, where that does not
    fit, one at a time, round after round."""
    facts: Facts = {}
    times: Times | None = None
    try:
        try:
            times = _together(engines, batches, contexts, repeats, facts)
        except Exception as error:
            if not out_of_memory(error) or len(engines) == 1:
                raise
        if times is None:  # not in the handler, whose error keeps alive what was allocated
            times = _in_turns(engines, batches, contexts, repeats, facts)
    finally:
        for engine in engines.values():
            engine.release()
    rows = []
    for context in contexts:
        for name, engine in engines.items():
            batch = batches[name]
            low, median, high = np.quantile(times[name, context], [0.25, 0.5, 0.75]).tolist()
            least = engine.shape.step(batch, context, machine)
            held, overhead = facts[name][0][context], facts[name][1]
            cache, weights = sum(held.values()), engine.shape.weight_bytes
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "context": context,
                    "step_seconds": median,
                    "step_seconds_low": low,
                    "step_seconds_high": high,
                    "tokens_per_second": batch / median,
                    "roofline_seconds": least,
                    "roofline_fraction": least / median,
                    "cache_bytes": cache,
                    **held,
                    "weight_bytes": weights,
                    "overhead_bytes": overhead,
                    "peak_bytes": weights + cache + overhead,
                }
            )
    return rows


def _prepare(engine: Engine, batch: int, contexts: Sequence[int], facts: Facts) -> None:
    """Make room for the longest context, and note once what is held there."""
    engine.prepare(batch, max(contexts))
    if engine.name not in facts:
        facts[engine.name] = {context: engine.cache_bytes(context) for context in contexts}, engine.overhead_bytes()


def _together(
    engines: Mapping[str, Engine],
    batches: Mapping[str, int],
    contexts: Sequence[int],
    repeats: int,
    facts: Facts,
) -> Times:
    for name, engine in engines.items():
        _prepare(engine, batches[name], contexts, facts)
    times: Times = {(name, context): [] for name in engines for context in contexts}
    for context in contexts:
        for repeat in range(repeats + 1):
            for name in turn(list(engines), repeat):
                seconds = engines[name].step(context)
                if repeat:  # the first is a warm-up
                    times[name, context].append(seconds)
    return times


def _in_turns(
    engines: Mapping[str, Engine],
    batches: Mapping[str, int],
    contexts: Sequence[int],
    repeats: int,
    facts: Facts,
) -> Times:
    for engine in engines.values():
        engine.release()
    times: Times = {(name, context): [] for name in engines for context in contexts}
    for repeat in range(repeats):
        for name in turn(list(engines), repeat):
            _prepare(engines[name], batches[name], contexts, facts)
            for context in contexts:
                engines[name].step(context)
                times[name, context].append(engines[name].step(context))
            engines[name].release()
    return times


def turn(names: list[str], repeat: int) -> list[str]:
    """The order of a repeat: forwards and backwards by turns, so that none is always the first."""
    return names if repeat % 2 else names[::-1]


def one_in_n_out(
    rows: Sequence[Mapping[str, Any]], model: str, batch: int, output_tokens: int, key: str = "step_seconds"
) -> float:
    """Tokens a second of a whole generation from an empty context: batch * N / sum of step times.

    The step time between two sampled contexts is taken as a straight line (attention reads one more token a
    step); contexts must cover 1 ... N. ``key`` names the times: the medians, a quartile, or the roofline's.
    """
    points = sorted((r["context"], r[key]) for r in rows if r["model"] == model and r["batch"] == batch)
    points = [p for p in points if p[0] <= output_tokens]
    if len(points) < 2 or points[0][0] != 1 or points[-1][0] != output_tokens:
        raise ValueError(f"step times of {model} at batch {batch} do not cover contexts 1 to {output_tokens}")
    seconds = points[0][1]
    for (left, start), (right, end) in pairwise(points):
        steps = right - left  # contexts left + 1 ... right
        seconds += steps * start + (end - start) * (steps + 1) / 2
    return batch * output_tokens / seconds


def headline(rows: Sequence[Mapping[str, Any]], teacher: str, model: str, options: ThroughputConfig) -> dict[str, Any]:
    """The figure that the Pareto plot shows: 1-in / N-out at the largest batch, beside the teacher's."""
    batch = max(row["batch"] for row in rows if row["model"] in (teacher, model))
    base = one_in_n_out(rows, teacher, batch, options.output_tokens)
    speed = one_in_n_out(rows, model, batch, options.output_tokens)
    return {
        "batch": batch,
        "output_tokens": options.output_tokens,
        "teacher_tokens_per_second": base,
        "tokens_per_second": speed,
        "ratio": speed / base,
    }
