"""Print what a run would do, without doing it: stages, steps, tokens, parameters, memory, time.

    distill plan configs/apriel_h1_15b.yaml
    distill plan demo train.steps=500

CONFIG or RUN. Works offline: with ``teacher_config`` in the config, the teacher itself is not needed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill import export
from distill.config import RunConfig
from distill.data.mixture import describe, describe_survey, origins
from distill.data.sources import check_place
from distill.engine import check_shares, engine_of, teacher_mode_of
from distill.errors import UserError
from distill.export import gguf
from distill.footprint import Counts, alternatives, footprint, stored_bytes
from distill.groups import GROUPS, group_of
from distill.hybrid.config import head_dim
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import check_convertible, check_teacher, hybrid_config
from distill.importance import parts
from distill.importance.comparison import entries
from distill.importance.halving import steps_of
from distill.mixers import ATTENTION
from distill.placement import replace
from distill.schedule import Stage
from distill.teacher import load_config as load_model_config
from distill.teacher import load_tokenizer, trust_code
from eval.machine import DEVICES, Machine
from eval.roofline import pays_from
from stages.common import say
from stages.context import rows_to_align
from stages.lineage import lineage_tokens, stages_of, unrecorded
from stages.speedup import settle
from stages.targets import read_config

GB = 1e9
SPARE = 0.9
"""Share of a device's memory that what is proposed may take: what is estimated can be more."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a teacher: in all, of one attention mixer, and of the mixer that replaces it."""

    total: int
    attention: int
    mixer: int


def main(args: argparse.Namespace) -> int:
    config = read_config(args.target, args.overrides)
    teacher = teacher_config(config)
    settle(config, teacher, say)
    stages = stages_of(config, teacher)
    for line in plan(config, teacher, stages):
        say(line)
    return 0


def teacher_config(config: RunConfig) -> Any:
    """The teacher's config: the one written out in ours, or the teacher's own."""
    if not config.teacher_config:
        trust_code(config.teacher, config.trust_remote_code)
        result = load_model_config(config.teacher)
        check_teacher(result)
        return result
    keys = dict(config.teacher_config)
    try:
        result = AutoConfig.for_model(keys.pop("model_type", "llama"), **keys)
    except Exception as error:  # transformers' validators raise errors of many kinds; each means a bad key
        raise UserError(f"teacher_config is no model config: {' '.join(str(error).split())[:200]}") from error
    check_teacher(result)
    return result


def sizes(config: RunConfig, teacher: Any) -> Sizes:
    """Count parameters on the meta device: no weight is allocated."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    attention = [ATTENTION] * teacher.num_hidden_layers
    mixers = replace(attention, [0], config.mixer.name)  # of the mixer that most blocks get
    with torch.device("meta"):
        hybrid = hybrid_config(teacher, mixers, config.mixer)
        model = FAMILIES[check_convertible(teacher)][1](hybrid)
    mixer, kept = (count(model.model.layers[block].self_attn) for block in (0, 1))
    return Sizes(total=count(model) - mixer + kept, attention=kept, mixer=mixer)


def counts_of(config: RunConfig, teacher: Any, mixers: list[str]) -> Counts:
    """Parameters of the student with this placement, by what sharing and freezing tell apart; on the meta device."""
    with torch.device("meta"):
        hybrid = FAMILIES[check_convertible(teacher)][1](hybrid_config(teacher, mixers, config.mixer))
        plain = AutoModelForCausalLM.from_config(teacher)
    names = group_of(hybrid)
    by_group = dict.fromkeys(GROUPS, 0)
    for name, parameter in hybrid.named_parameters():
        by_group[names[name]] += parameter.numel()
    student = sum(by_group.values())
    blocks = [sum(p.numel() for p in block.parameters()) for block in plain.model.layers]
    return Counts(
        student=student,
        trained=student - sum(by_group[group] for group in config.train.freeze),
        block=max(sum(p.numel() for p in block.parameters()) for block in hybrid.model.layers),
        embeddings=by_group["embeddings"],
        teacher=sum(p.numel() for p in plain.parameters()),
        teacher_block=max(blocks),
        teacher_ends=sum(p.numel() for p in plain.parameters()) - sum(blocks),
        teacher_head=plain.lm_head.weight.numel(),
    )


def device_memory(config: RunConfig) -> float:
    """Bytes of one device: as the config says, or of this machine's GPU; 0 where neither does."""
    if config.plan.device_memory or not torch.cuda.is_available():
        return config.plan.device_memory * GB
    return float(torch.cuda.get_device_properties(0).total_memory)


def memory_lines(config: RunConfig, teacher: Any, mixers: list[str], devices: int) -> list[str]:
    """What a step of the largest stage holds on one device, by part; UserError where that does not fit, with what
    would."""
    counts = counts_of(config, teacher, mixers)
    found = footprint(config, teacher, mixers, counts, devices)
    engine = engine_of(config.engine, devices)
    named = f"{engine} {config.engine.config}".strip()
    parts = ", ".join(f"{name} {value / GB:,.3g}" for name, value in found.parts.items())
    lines = [
        f"memory    a device, {named}, {devices} process{'es' * (devices > 1)}: {found.at_once / GB:,.3g} GB at once"
    ]
    mode = teacher_mode_of(config.train, config.engine)
    lines.append(f"          {parts} (GB; activations estimated, the rest counted; teacher {mode})")
    if found.host:
        waiting = ", ".join(f"{name} {value / GB:,.3g} GB" for name, value in found.host.items())
        lines.append(f"          in the CPU's memory for each device: {waiting}")
    room = device_memory(config)
    if room and found.at_once > room:
        ways = []
        for name, other, processes in alternatives(config, devices):
            size = footprint(other, teacher, mixers, counts, processes).at_once
            ways += [f"{name} ({size / GB:,.3g} GB)"] if size <= SPARE * room else []
        raise UserError(
            f"a step takes {found.at_once / GB:,.3g} GB on each of {devices} devices ({named}), which have "
            f"{room / GB:,.3g} GB: {parts} (teacher {mode})\n"
            + (f"what would fit: {'; '.join(ways[:4])}" if ways else "no engine and number of devices known here fits")
        )
    return lines


def flops_per_second(config: RunConfig) -> tuple[float, str]:
    """What one device does: as the config says (plan.device_tflops), or this machine's fp32 GEMM, measured."""
    if config.plan.device_tflops:
        return config.plan.device_tflops * 1e12, f"{config.plan.device_tflops:g} TFLOP/s a device (plan.device_tflops)"
    a = torch.randn(1024, 1024)
    a @ a
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    speed = 10 * 2 * 1024**3 / (time.perf_counter() - began)
    return speed, f"{speed / 1e9:.0f} GFLOP/s, this machine's fp32 matrix product, measured now"


def plan(config: RunConfig, teacher: Any, stages: list[Stage]) -> list[str]:
    """The plan as lines of text."""
    size = sizes(config, teacher)
    workers = max(config.slurm.nodes * config.slurm.gpus_per_node, 1)
    check_shares(config.train, workers)
    speed, source = flops_per_second(config)
    usable = speed * config.plan.utilisation * workers
    train = config.train
    blocks = teacher.num_hidden_layers
    lines = [
        f"teacher   {config.teacher}: {blocks} blocks, hidden {teacher.hidden_size}, "
        f"{teacher.num_attention_heads} query / {teacher.num_key_value_heads} key-value heads of {head_dim(teacher)}, "
        f"{size.total / 1e6:,.1f} M parameters",
        f"mixer     {config.mixer.name} from {config.mixer.init} ({config.mixer.mil_layout}): a block's attention of "
        f"{size.attention / 1e6:,.2f} M parameters becomes {size.mixer / 1e6:,.2f} M",
        *(f"          {mixer} in block {block}" for block, mixer in sorted(config.mixer.blocks.items())),
        f"training  {train.loss}, tau {train.temperature:g}, sequence {config.data.sequence_length:,}, batch "
        f"{train.batch_size} rows, AdamW at {train.learning_rate:g}, {train.warmup_steps} warm-up steps, linear decay",
        f"data      {describe(config.data)}",
        *(f"          {line}" for line in ([] if config.teacher_config else data_lines(config))),
        "",
        f"{'stage':12s}{'score':12s}{'candidates':>11s}{'new':>5s}{'replaced M':>12s}{'steps':>9s}{'tokens':>10s}"
        f"{'lineage':>10s}{'hours':>9s}  start",
    ]
    total_hours = 0.0
    for stage in stages:
        candidates = stage.candidates
        student = size.total + stage.replaced * (size.mixer - size.attention)
        step_flops = 6 * student + 2 * size.total + (2 * student if train.gradient_checkpointing else 0)
        flops = float(step_flops) * stage.tokens
        for entry in entries(config.score, stage.scorer):
            own, by = replace_fields(config, score=entry.options), replace_fields(stage, scorer=entry.scorer)
            if "mmr" in parts(entry.options, entry.scorer):
                flops += mmr_flops(own, by, step_flops, student, size.total)
            flops += alignment_flops(own, by, student, size.mixer)
        hours = flops / usable / 3600
        total_hours += hours
        lines.append(
            f"{stage.name:12s}{stage.scorer:12s}{candidates:11d}{stage.added:5d}"
            f"{stage.replaced * size.attention / 1e6:12,.1f}{stage.steps:9,d}{tokens(stage.tokens):>10s}"
            f"{tokens(lineage_tokens(config, stages, stage)):>10s}{hours:9.3g}  {stage.start.name}"
        )
    lines += [f"warning: {line}" for line in unrecorded(stages)]
    final = size.total + max(stage.replaced for stage in stages) * (size.mixer - size.attention)
    models = sum(2 + len(stage.keep) for stage in stages)
    largest = max(stages, key=lambda stage: stage.replaced).replaced
    offline = train.teacher_mode == "offline"
    stored = sum(stored_bytes(config, stage.tokens) for stage in stages) if offline else 0.0
    placement = replace([ATTENTION] * blocks, list(range(largest)), config.mixer.of)
    lines += [
        "",
        f"time      {total_hours:,.3g} h on {workers} device{'s' * (workers > 1)}, scoring by losses included, LOO "
        f"and measuring not; assumes {source}, used at {100 * config.plan.utilisation:.0f}%",
        *memory_lines(config, teacher, placement, workers),
        f"disk      {models * final * (2 if config.dtype == 'bfloat16' else 4) / GB:,.3g} GB of checkpoints"
        + (f"; the teacher's logits at most {stored / GB:,.3g} GB, before they are compressed" if stored else ""),
    ]
    return [*lines, pays_line(config, teacher), *serving_lines(config, teacher, placement)]


def alignment_flops(config: RunConfig, stage: Stage, model: int, mixer: int) -> float:
    """Of a score with aligned mixers (0 of any other): the passes of the model of so many parameters that feed the
    mixers and record what blocks are given, the mixers' training, and tries, each of which runs half of the model."""
    options, candidates = config.score.aligned, stage.candidates
    rounds = {"aligned": 1, "greedy": stage.added, "kl_restore": max(candidates - stage.added, 1)}
    if not (taken := [name for name in parts(config.score, stage.scorer) if name in rounds]):
        return 0.0
    read = rows_to_align(config) * config.data.sequence_length
    passes = sum(1 + (candidates - number) / 2 for name in taken for number in range(rounds[name]))
    return read * (2 * model + 6 * candidates * mixer) + options.heldout_tokens * 2 * model * passes


def mmr_flops(config: RunConfig, stage: Stage, step_flops: int, student: int, teacher: int) -> float:
    """What MMR takes, from what a token of a training step takes and the parameters of student and teacher: everything
    is trained, or the candidates go in lockstep, each through the blocks above it (half of them, on average)."""
    mmr, train = config.score.mmr, config.train
    seen = steps_of(stage.candidates, mmr, stage.added) * train.batch_size * config.data.sequence_length
    held = 2 * mmr.heldout_tokens
    if mmr.trainable == "all":
        return float(seen * step_flops + stage.candidates * held * 2 * (student + teacher))
    if mmr.lockstep:
        once = mmr.steps * train.batch_size * config.data.sequence_length + held
        return float(once * 2 * (student + teacher) + (seen * 2 + stage.candidates * held) * student)
    return float((seen + stage.candidates * held) * 2 * (student + teacher) + seen * student)


def pays_line(config: RunConfig, teacher: Any) -> str:
    """From which context on a replaced block decodes faster, on the roofline of the device that serves."""
    width, machine = (2, DEVICES["h100"]) if config.dtype == "bfloat16" else (4, Machine.measure())
    batches = config.measure.throughput.batches
    found = pays_from(teacher, config.mixer.name, config.mixer, machine, batches, width)
    where = ", ".join(f"{'none' if at is None else f'{at:,}'} at batch {batch}" for batch, at in found.items())
    return f"decoding  a block is faster with {config.mixer.name} from context {where} on ({machine.name}, roofline)"


def serving_lines(config: RunConfig, teacher: Any, mixers: list[str]) -> list[str]:
    """To which forms the hybrids can be exported, and what stands against the others: better known before training."""
    hybrid = hybrid_config(teacher, mixers, config.mixer)
    found = {form: export.obstacles(hybrid, form) for form in export.available()}
    if not config.teacher_config and not found["gguf"]:
        found["gguf"] = gguf.tokenizer_obstacles(config.teacher, teacher)
    lines = []
    for reasons in sorted({"; ".join(each) for each in found.values()}):
        forms = ", ".join(form for form, each in found.items() if "; ".join(each) == reasons)
        lines.append(f"not in {forms}: {reasons}" if reasons else f"exact in {forms} ('distill export')")
    return [f"{'serving' if not i else '':10s}{line}" for i, line in enumerate(lines)]


def data_lines(config: RunConfig) -> list[str]:
    """What the data hold that can be read here, in rows of the teacher's tokens; UserError where there are none."""
    for origin in origins(config.data):
        check_place(origin, "data.source")
    return describe_survey(config.data, lambda: load_tokenizer(config.teacher))


def tokens(count: int) -> str:
    """``0.61M``, ``55.9B``."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit / 2:
            return f"{count / unit:.3g}{name}"
    return str(count)
