"""What serving a model would take, from step times and a few more measurements: two protocols, prefill, memory.

``details`` gives these keys, which ``measure.json`` and a record of ``distill bench`` have under ``serving`` beside
``throughput`` (step rows: `eval.throughput`); seconds and bytes are always of the whole batch:

- ``machine``: ``name``, ``copy_bytes_per_second``, ``product_flops_per_second``, ``memory_bytes``
- ``one_in_n_out``: a row a model and protocol: ``model``, ``protocol`` (``equal_batch``: all at one batch, a row a
  batch; ``equal_memory``: each at its largest batch within ``memory_bytes``), ``batch``, ``output_tokens``,
  ``tokens_per_second`` with ``_low`` and ``_high`` (from the quartiles of the step times),
  ``roofline_tokens_per_second``, ``roofline_fraction``, ``ratio`` (to the first model, the teacher, under the same
  protocol and, for equal_batch, at the same batch; null where that has no row, as where it does not fit in memory)
  and ``roofline_ratio`` (that of the rooflines: what is predicted),
  ``how`` (``sampled``: step times integrated; ``full``: run to the end; ``predicted``), and, for equal_memory,
  ``memory_bytes``, the cap, and ``largest_batch``, what fits there by that count, where less may have run
- ``equal_memory``: the step rows of that protocol, keys as in ``throughput``
- ``prefill``: rows of ``model``, ``batch``, ``tokens`` (of each prompt), ``seconds`` (median: the time to the first
  token of the batch) with ``seconds_low`` and ``_high``, ``tokens_per_second``, ``roofline_seconds``,
  ``roofline_fraction``
- ``memory``: rows of ``model``, ``batch`` 1, ``tokens``, ``weight_bytes``, ``kv_bytes``, ``state_bytes``,
  ``overhead_bytes``, ``total_bytes``, ``measured`` (false: computed from the shape)
- ``pays_from``: mixer -> batch -> the context from which a block is faster with it than with attention, on the roofline
  (null: not within a million tokens)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.config import MixerConfig, ThroughputConfig
from distill.errors import out_of_memory
from distill.mixers import ATTENTION
from eval.backends import Engine
from eval.machine import Machine
from eval.roofline import Shape, pays_from
from eval.throughput import (
    Report,
    contexts_of,
    engines_of,
    halving,
    machine_of,
    one_in_n_out,
    silent,
    step_rows,
    turn,
)

USABLE = 0.9  # of a GPU's memory, where no cap is given
AFFORDABLE = 1 << 29  # bytes of a cache that is made only to be measured
STEPS = ("step_seconds", "step_seconds_high", "step_seconds_low")  # the slow quartile gives the low speed
Row = dict[str, Any]


def details(
    models: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    options: ThroughputConfig,
    report: Report = silent,
) -> dict[str, Any]:
    """The keys above for ``models`` (the first is what the others are compared with), whose step times are ``rows``."""
    engines, machine = engines_of(models), machine_of(models)
    second = equal_memory(engines, rows, options, machine, report)
    speeds = speed_rows(list(engines), rows, options, "equal_batch")
    if options.full:
        speeds = [full(engines, row, options, report) for row in speeds]
    speeds += speed_rows(list(engines), second, options, "equal_memory")
    return {
        "machine": machine_record(machine),
        "one_in_n_out": with_ratios(speeds, next(iter(engines))),
        "equal_memory": second,
        "prefill": prefill_rows(engines, options, machine, report),
        "memory": memory_rows(engines, options.lengths),
        "pays_from": pays_of(engines, options, machine),
    }


def machine_record(machine: Machine) -> Row:
    return {
        "name": machine.name,
        "copy_bytes_per_second": machine.copy,
        "product_flops_per_second": machine.gemm,
        "memory_bytes": machine.memory,
    }


def speed_rows(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], options: ThroughputConfig, protocol: str
) -> list[Row]:
    """1-in / N-out of every model at every batch of ``rows``, beside the roofline's."""
    tokens, found = options.output_tokens, []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        for name in names:
            some = next((row for row in rows if row["model"] == name and row["batch"] == batch), None)
            if some is None:
                continue
            speed, low, high = (one_in_n_out(rows, name, batch, tokens, key) for key in STEPS)
            least = one_in_n_out(rows, name, batch, tokens, "roofline_seconds")
            row = {
                "model": name,
                "protocol": protocol,
                "batch": batch,
                "output_tokens": tokens,
                "tokens_per_second": speed,
                "tokens_per_second_low": low,
                "tokens_per_second_high": high,
                "roofline_tokens_per_second": least,
                "roofline_fraction": speed / least,
                "how": "sampled",
            }
            found.append(row | {key: some[key] for key in ("memory_bytes", "largest_batch") if key in some})
    return found


def with_ratios(rows: Sequence[Row], first: str) -> list[Row]:
    """Rows with ``ratio``: to the ``first`` model's, under the same protocol and (equal_batch) at the same batch; None
    where it has no such row."""

    def key(row: Row) -> tuple[str, int]:
        return row["protocol"], row["batch"] if row["protocol"] == "equal_batch" else 0

    base = {key(row): row for row in rows if row["model"] == first}
    of = {"ratio": "tokens_per_second", "roofline_ratio": "roofline_tokens_per_second"}

    def ratios(row: Row) -> dict[str, float | None]:
        beside = base.get(key(row))
        return {ratio: row[speed] / beside[speed] if beside else None for ratio, speed in of.items()}

    return [{**row, **ratios(row)} for row in rows]


def full(engines: Mapping[str, Engine], row: Row, options: ThroughputConfig, report: Report) -> Row:
    """The row of a generation that is run to its end, in place of the integral over sampled contexts."""
    engine, tokens = engines[row["model"]], options.output_tokens
    engine.prepare(row["batch"], tokens)
    engine.generate(min(tokens, 8))  # a warm-up
    seconds = engine.generate(tokens)
    engine.release()
    speed = row["batch"] * tokens / seconds
    report(f"{row['model']}, batch {row['batch']}, {tokens} tokens in full: {speed:,.0f} tokens/s")
    spread = {"tokens_per_second_low": speed, "tokens_per_second_high": speed}
    fraction = speed / row["roofline_tokens_per_second"]
    return {**row, "tokens_per_second": speed, **spread, "roofline_fraction": fraction, "how": "full"}


def memory_cap(
    engines: Mapping[str, Engine], rows: Sequence[Mapping[str, Any]], options: ThroughputConfig, machine: Machine
) -> float:
    """Bytes within which each model gets its largest batch: as given, a GPU's, or what the first model takes at the
    largest batch of ``rows`` (on a CPU all memory would mean batches that no one waits for)."""
    if options.memory_gb:
        return options.memory_gb * 1e9
    if not machine.name.endswith("CPU threads"):
        return USABLE * machine.memory
    first = next(iter(engines))
    return max(float(row["peak_bytes"]) for row in rows
               if row["model"] == first and row["context"] == options.output_tokens)  # fmt: skip


def equal_memory(
    engines: Mapping[str, Engine],
    rows: Sequence[Mapping[str, Any]],
    options: ThroughputConfig,
    machine: Machine,
    report: Report = silent,
) -> list[Row]:
    """Step rows of every model at its largest batch within the same memory: weights, cache at N tokens, and what a step
    needs beside them, as measured in ``rows``. The models take turns, round after round.

    A model that does not fit at all has no rows.
    """
    cap, tokens = memory_cap(engines, rows, options, machine), options.output_tokens
    batches: dict[str, int] = {}
    for name, engine in engines.items():
        widest = max((row for row in rows if row["model"] == name), key=lambda row: row["batch"])
        batches[name] = engine.shape.largest_batch(tokens, cap, widest["overhead_bytes"] / widest["batch"])
        if not batches[name]:
            report(f"{name} does not fit in {cap / 1e9:,.3g} GB with {tokens} tokens")
    fitting = {name: engine for name, engine in engines.items() if batches[name]}
    run = {name: _possible(engine, batches[name], options, report) for name, engine in fitting.items()}
    measured = step_rows(fitting, run, contexts_of(options), options.repeats, machine) if fitting else []
    for name in fitting:
        speed = one_in_n_out(measured, name, run[name], tokens)
        report(f"{name} at its largest batch in {cap / 1e9:,.3g} GB, {run[name]}: {speed:,.0f} tokens/s")
    return [{**row, "memory_bytes": cap, "largest_batch": batches[row["model"]]} for row in measured]


def _possible(engine: Engine, batch: int, options: ThroughputConfig, report: Report) -> int:
    """``batch``, or half of it as often as memory does not suffice for a step at the longest context."""
    longest = max(contexts_of(options))

    def once(batch: int) -> None:
        engine.prepare(batch, longest)
        engine.step(longest)

    try:
        return halving(batch, once, report)[0]
    finally:
        engine.release()


def prefill_rows(
    engines: Mapping[str, Engine], options: ThroughputConfig, machine: Machine, report: Report = silent
) -> list[Row]:
    """Prefill at every batch and context with at most ``prefill_tokens`` in all, the models in turns. What does not fit
    in memory is left out, which is reported: the smaller ones are measured anyway."""
    rows = []
    for batch in options.batches:
        for tokens in sorted(set(options.contexts)):
            if batch * tokens > options.prefill_tokens or tokens < 2:
                continue
            try:
                times = _prefill_times(engines, batch, tokens, options.repeats)
            except Exception as error:  # of torch, of numpy or of a backend; anything but memory goes on
                if not out_of_memory(error):
                    raise
                report(f"out of memory in a prefill of {batch} x {tokens}: it is left out")
                continue
            for name, engine in engines.items():
                low, median, high = np.quantile(times[name], [0.25, 0.5, 0.75]).tolist()
                least = engine.shape.prefill(batch, tokens, machine)
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "tokens": tokens,
                        "seconds": median,
                        "seconds_low": low,
                        "seconds_high": high,
                        "tokens_per_second": batch * tokens / median,
                        "roofline_seconds": least,
                        "roofline_fraction": least / median,
                    }
                )
            speeds = ", ".join(f"{r['model']} {r['tokens_per_second']:,.0f} tokens/s" for r in rows[-len(engines) :])
            report(f"prefill of {batch} x {tokens}: {speeds}")
    return rows


def _prefill_times(engines: Mapping[str, Engine], batch: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by model."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name in turn(list(engines), repeat):
            seconds = engines[name].prefill(batch, tokens)
            if repeat:  # the first is a warm-up
                times[name].append(seconds)
    return times


def memory_row(shape: Shape, name: str, tokens: int, overhead: float, held: Mapping[str, int] | None) -> Row:
    """Memory of one sequence of ``tokens``; ``held``: bytes of the cache where it was made, else they are computed."""
    cache = held or {"kv_bytes": shape.kv_bytes(1, tokens), "state_bytes": shape.state_bytes(1)}
    total = shape.weight_bytes + sum(cache.values()) + overhead
    return {
        "model": name,
        "batch": 1,
        "tokens": tokens,
        "weight_bytes": shape.weight_bytes,
        **cache,
        "overhead_bytes": overhead,
        "total_bytes": total,
        "measured": held is not None,
    }


def memory_rows(engines: Mapping[str, Engine], lengths: Sequence[int]) -> list[Row]:
    """Memory of one sequence by its length: a cache is made and a step taken where that is cheap and fits; elsewhere
    it is computed from the shape, with the overhead of the longest that was measured."""
    rows = []
    for name, engine in engines.items():
        overhead = 0
        for tokens in sorted(lengths):
            held = None
            cheap = engine.shape.kv_bytes(1, tokens) + engine.shape.state_bytes(1) <= AFFORDABLE
            if cheap and engine.holds_cache:
                try:
                    engine.prepare(1, tokens)
                    overhead, held = engine.overhead_bytes(), engine.cache_bytes(tokens)
                except Exception as error:  # of torch or of a backend
                    if not out_of_memory(error):
                        raise
            rows.append(memory_row(engine.shape, name, tokens, overhead, held))
        engine.release()
    return rows


def pays_of(engines: Mapping[str, Engine], options: ThroughputConfig, machine: Machine) -> dict[str, Any]:
    """``pays_from`` of every mixer that the models have, at every batch."""
    found: dict[str, Any] = {}
    for engine in engines.values():
        config = getattr(getattr(engine, "model", None), "config", None)
        for mixer in dict.fromkeys(getattr(config, "mixers", None) or []):
            if mixer not in (ATTENTION, *found) and config is not None:
                known = {key: value for key, value in config.mixer_config.items() if key != "bc_norm"}
                choice = MixerConfig(**known, bc_norm="always" if config.mixer_config["bc_norm"] else "never")
                found[mixer] = pays_from(config, mixer, choice, machine, options.batches, engine.shape.width)
    return found
