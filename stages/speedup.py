"""A speed in place of a number of blocks: ``target: 1.8x at 16k``.

    distill plan demo target="1.8x at 16k"

h is the smallest at which the hybrid generates 16,384 tokens 1.8 times as fast as its teacher: as an earlier run
recorded it (``plan.records``), or else as the roofline predicts for the device (``plan.device``). The run folder keeps
the h that a target resolved to, so that a run does not change its stages when the device is measured anew.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import RunConfig
from distill.config_merge import load_config
from distill.errors import UserError
from distill.placement import hybrid_name, parse_name
from distill.schedule import PAPER_BLOCKS, PAPER_SCHEDULE, scaled
from distill.teacher import DTYPES
from eval import serving, shapes
from eval.machine import DEVICES, Machine, named
from eval.roofline import Shape, shapes_of
from eval.runs import read_run
from eval.throughput import one_in_n_out

FORM = "such as '1.8x at 16k', '1.8x at 16k, batch 64' or '1.8x at 16k, equal memory'"
PATTERN = re.compile(r"(\d+(?:\.\d+)?)x at (\d+)(k?)(?:, (?:batch (\d+)|(equal memory)))?")


@dataclass(frozen=True)
class Target:
    """A speed to reach: ``ratio`` to the teacher's when one token goes in and ``tokens`` come out.

    ``batch`` sequences at a time, the same for both; with 0 each at its largest batch within the same memory.
    """

    ratio: float
    tokens: int
    batch: int


@dataclass(frozen=True)
class Speed:
    """The ratio of a hybrid to its teacher, and how it is known: ``predicted``, or the run that recorded it."""

    ratio: float
    how: str


def parse(text: str, batches: Sequence[int]) -> Target:
    """The target that ``text`` says, at the largest of ``batches`` unless it names another; 16k are 16,384 tokens.

    Raises UserError for a text of another form.
    """
    match = PATTERN.fullmatch(text.strip())
    if not match:
        raise UserError(f"target='{text}' cannot be read: give how many times as fast, and at which length, {FORM}")
    ratio, tokens = float(match[1]), int(match[2]) * (1024 if match[3] else 1)
    if ratio <= 1 or not 2 <= tokens < 2**31:
        raise UserError(f"target='{text}': the speed must be above 1x, the length at least 2 tokens, {FORM}")
    batch = 0 if match[5] else int(match[4] or max(batches))
    if match[4] and not batch:
        raise UserError(f"target='{text}': a batch has at least 1 sequence")
    return Target(ratio, tokens, batch)


def settle(config: RunConfig, teacher: Any, say: Callable[[str], None]) -> None:
    """Where ``config`` has a target, make its schedule end with the h that meets it; the stages before it are those of
    the schedule (without one: of the paper's) that are below. ``teacher`` is the teacher's config.

    Raises UserError for a target that cannot be read or reached.
    """
    if not config.target:
        return
    target = parse(config.target, config.measure.throughput.batches)
    if (kept := _kept(config)) is not None:
        h = kept[-1]
        config.schedule = [*(each for each in config.schedule if each < h), h] if config.schedule else kept
        say(f"target    {config.target}: {hybrid_name(h, teacher.num_hidden_layers)}, as resolved before")
        return
    machine = device(config)
    speeds = {**predicted(config, teacher, target, machine), **recorded(config, teacher, target)}
    h = smallest(config.target, target, speeds, machine)
    before = config.schedule or scaled(PAPER_SCHEDULE, PAPER_BLOCKS, teacher.num_hidden_layers)
    config.schedule = [*(each for each in before if each < h), h]
    below = f"; H1-{h - 1}: {speeds[h - 1].ratio:.2f}x" if h > 1 else ""
    name, found = hybrid_name(h, teacher.num_hidden_layers), speeds[h]
    say(f"target    {config.target}: {name}, {found.ratio:.2f}x {found.how} (on {machine.name}{below})")


def smallest(text: str, target: Target, speeds: Mapping[int, Speed], machine: Machine) -> int:
    """The smallest h whose speed meets the target; UserError where none does, with the best that can be had."""
    met = [h for h in sorted(speeds) if speeds[h].ratio >= target.ratio]
    if met:
        return met[0]
    best = max(speeds, key=lambda h: speeds[h].ratio)
    blocks = max(speeds) + 1
    raise UserError(
        f"target='{text}' cannot be reached on {machine.name}: the best is {hybrid_name(best, blocks)} with "
        f"{speeds[best].ratio:.2f}x ({speeds[best].how})\n"
        "ask for less, for a longer generation or a larger batch, or predict for another device (plan.device)"
    )


def device(config: RunConfig) -> Machine:
    """The device that speeds are predicted for: that of the config, or an H100 for bfloat16, else this machine."""
    if config.plan.device:
        return named(config.plan.device, DTYPES[config.dtype])
    return DEVICES["h100"] if config.dtype == "bfloat16" else Machine.measure()


def predicted(config: RunConfig, teacher: Any, target: Target, machine: Machine) -> dict[int, Speed]:
    """By h, what the roofline of ``machine`` says. Every h is extrapolated from the shapes of the teacher and of H1-1
    (which blocks are replaced makes no difference to a roofline)."""
    blocks, width = teacher.num_hidden_layers, DTYPES[config.dtype].itemsize
    base, one = shapes_of(teacher, (0, 1), (config.mixer.name,), config.mixer, width).values()
    every = {"teacher": base, **{str(h): replaced(base, one, h) for h in range(1, blocks)}}
    options = dataclasses.replace(config.measure.throughput, contexts=[], output_tokens=target.tokens)
    batches = dict.fromkeys(every, target.batch)
    if not target.batch:
        cap = options.memory_gb * 1e9 or serving.USABLE * machine.memory
        batches = {
            name: shape.largest_batch(target.tokens, cap, shapes.overhead(shape)) for name, shape in every.items()
        }
        if not batches["teacher"]:
            raise UserError(
                f"target='{config.target}': not one sequence of {target.tokens:,} tokens of the teacher fits in "
                f"{cap / 1e9:,.3g} GB of {machine.name}: give a batch, or measure.throughput.memory_gb"
            )
    rows = shapes.step_rows(every, batches, options, machine)
    speed = {name: one_in_n_out(rows, name, batches[name], target.tokens) for name in every}
    return {h: Speed(speed[str(h)] / speed["teacher"], "predicted") for h in range(1, blocks)}


def replaced(base: Shape, one: Shape, h: int) -> Shape:
    """The shape with h blocks replaced, from that with none and that with one."""
    count = {(inputs, outputs): 0 for inputs, outputs, _ in (*base.linears, *one.linears)}
    for sign, shape in ((1 - h, base), (h, one)):
        for inputs, outputs, many in shape.linears:
            count[inputs, outputs] += sign * many
    return dataclasses.replace(
        base,
        parameters=base.parameters + h * (one.parameters - base.parameters),
        norms=base.norms + h * (one.norms - base.norms),
        linears=tuple((*size, many) for size, many in sorted(count.items()) if many),
        attention=base.attention - h,
        states=one.states * h,
    )


def recorded(config: RunConfig, teacher: Any, target: Target) -> dict[int, Speed]:
    """By h, what the runs under ``plan.records`` measured at this batch and length; the later run counts.

    Raises UserError for a folder that is no run, or one of another teacher or mixer.
    """
    found: dict[int, Speed] = {}
    for name in config.plan.records:
        folder = Path(name).expanduser()
        if not (folder / "run.yaml").is_file():
            raise UserError(f"plan.records: {name} is no run folder: it has no run.yaml")
        theirs = load_config(RunConfig, folder / "run.yaml")
        for key, own, other in (
            ("teacher", config.teacher, theirs.teacher),
            ("mixer.name", config.mixer.name, theirs.mixer.name),
        ):
            if own != other:
                raise UserError(f"plan.records: {name} has {key}={other}, and this run {key}={own}")
        for stage in read_run(folder).stages:
            h, blocks = parse_name(stage.name)
            ratio = _ratio(stage.records["measure"] or {}, stage.name, target)
            if ratio is not None and blocks == teacher.num_hidden_layers:
                found[h] = Speed(ratio, f"recorded in {name}")
    return found


def _ratio(measure: Mapping[str, Any], name: str, target: Target) -> float | None:
    """The ratio that a measure of the hybrid ``name`` records for the target's batch and length, if it does."""
    rows = (measure.get("serving") or {}).get("one_in_n_out") or []
    for row in rows:
        batch = row["batch"] if row["protocol"] == "equal_batch" else 0
        if (row["model"], row.get("output_tokens"), batch) == (name, target.tokens, target.batch):
            return float(row["ratio"]) if row.get("ratio") else None
    headline = measure.get("headline") or {}
    if (headline.get("output_tokens"), headline.get("batch")) == (target.tokens, target.batch):
        return float(headline["ratio"])
    return None


def _kept(config: RunConfig) -> list[int] | None:
    """The schedule that the run folder resolved the same target to, for the same hybrids and device."""
    file = Path(config.run_dir).expanduser() / "run.yaml"
    if not file.is_file():
        return None
    before = load_config(RunConfig, file)

    def depends(run: RunConfig) -> tuple[Any, ...]:
        measured = run.measure.throughput
        speed = parse(run.target, measured.batches), measured.memory_gb
        return run.target, speed, run.teacher, run.mixer, run.dtype, run.plan.device, run.plan.records

    same = before.target == config.target and depends(before) == depends(config)
    return before.schedule if before.schedule and same else None
