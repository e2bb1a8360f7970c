"""Decode throughput: step times over batch and context, models interleaved in one run, and 1-in / N-out.

1-in / N-out throughput = batch * N / sum over t of step_time(t): step times are integrated, never speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from distill.config import ThroughputConfig
from eval.backends.hf import Decoder


def measure(
    models: Mapping[str, Any], options: ThroughputConfig, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Time a decode step of every model at every batch and context.

    The models take turns, repeat by repeat, so that a drift of the machine meets all alike. Contexts 1 and
    ``output_tokens`` are added to those of the config, for the integral.

    Returns:
        Rows of model, batch, context, step_seconds (median) with quartiles ``_low`` and ``_high``,
        tokens_per_second and, of the whole batch, cache_bytes = kv_bytes + state_bytes.
    """
    contexts = sorted({1, options.output_tokens, *options.contexts})
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        for context in contexts:
            decoders = {name: Decoder(model, batch, context) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(options.repeats + 1):
                order = list(decoders) if repeat % 2 else list(reversed(decoders))
                for name in order:
                    seconds = decoders[name].timed_step()
                    if repeat:  # the first is a warm-up
                        times[name].append(seconds)
            for name, decoder in decoders.items():
                held = decoder.cache_bytes()
                low, median, high = np.quantile(times[name], [0.25, 0.5, 0.75]).tolist()
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "context": context,
                        "step_seconds": median,
                        "step_seconds_low": low,
                        "step_seconds_high": high,
                        "tokens_per_second": batch / median,
                        "cache_bytes": sum(held.values()),
                        **held,
                    }
                )
            speeds = ", ".join(f"{r['model']} {r['tokens_per_second']:,.0f}" for r in rows[-len(models) :])
            report(f"batch {batch}, context {context}: {speeds} tokens/s")
    return rows


def one_in_n_out(rows: Sequence[Mapping[str, Any]], model: str, batch: int, output_tokens: int) -> float:
    """Tokens a second of a whole generation from an empty context: batch * N / sum of step times.

    The step time between two sampled contexts is taken as a straight line (attention reads one more token a
    step); contexts must cover 1 ... N.
    """
    points = sorted((r["context"], r["step_seconds"]) for r in rows if r["model"] == model and r["batch"] == batch)
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
    batch = max(options.batches)
    base = one_in_n_out(rows, teacher, batch, options.output_tokens)
    speed = one_in_n_out(rows, model, batch, options.output_tokens)
    return {
        "batch": batch,
        "output_tokens": options.output_tokens,
        "teacher_tokens_per_second": base,
        "tokens_per_second": speed,
        "ratio": speed / base,
    }
