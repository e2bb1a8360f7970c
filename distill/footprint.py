"""Memory of one device in a training step, by part, for an engine and a number of processes.

Weights, gradients and AdamW's moments are counted; activations are what autograd keeps of each kind of block, in floats
a token, as counted on real blocks by its hooks (``tests/test_footprint.py`` counts again). E = hidden size, F = MLP,
Q = query heads x head size, K = key-value heads x head size, N = state size, P = processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from distill.config import RunConfig
from distill.engine import buffered, engine_of, offloaded, teacher_mode_of, zero_stage
from distill.hybrid.config import head_dim

FLOAT = 4.0
HALF = 0.6
"""What bfloat16 autocast leaves of activations: products are in half the bytes, norms and residuals are not."""
CHUNK_BYTES = float(1 << 26)
"""The largest [tokens, V] tensor of the loss."""
STATES = 256.0
"""Tokens between the states that a scan keeps for its backward."""


@dataclass(frozen=True)
class Counts:
    """Parameters of the models: the student in all, what of it is trained, its largest block, its embeddings (and LM
    head, unless tied); the teacher in all, its largest block, what of it is in no block, and its LM head."""

    student: int
    trained: int
    block: int
    embeddings: int
    teacher: int
    teacher_block: int
    teacher_ends: int
    teacher_head: int


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device, by part, and those of each part that wait in the CPU's memory."""

    parts: dict[str, float]
    host: dict[str, float]
    at_once: float
    """The peak: activations go as gradients come, so that both are there only where gradients are accumulated."""


def kept_by_block(mixer: str, shape: Any, d_state: int) -> float:
    """Floats a token that a block keeps for its backward."""
    hidden, mlp, head = shape.hidden_size, shape.intermediate_size, head_dim(shape)
    query, key = shape.num_attention_heads * head, shape.num_key_value_heads * head
    common = 6 * hidden + 4 * mlp + 2
    if mixer == "mamba1":
        expanded = 2 * key if key < query else 0
        return common + query * (10.5 + d_state / STATES) + expanded + -(-hidden // 16)
    if mixer == "mamba2":
        return common + query * (13 + head / STATES)
    return common + 2 * query + 2 * key + shape.num_attention_heads


def activations(config: RunConfig, shape: Any, mixers: list[str], tokens: int) -> float:
    """Bytes that one micro-batch of ``tokens`` keeps for its backward."""
    blocks = [kept_by_block(mixer, shape, config.mixer.d_state) for mixer in mixers]
    share = HALF if config.dtype == "bfloat16" else 1.0
    if config.train.gradient_checkpointing:  # the residual stream between blocks, and one block made again
        return tokens * FLOAT * (len(blocks) * shape.hidden_size + share * max(blocks))
    return tokens * FLOAT * (share * sum(blocks) + 2.5 * shape.hidden_size)


def loss_bytes(shape: Any, tokens: int, trains_head: bool) -> float:
    """Bytes of the chunked loss: some five [chunk, V] tensors, the head's gradient, and those of the hidden states."""
    chunk = min(CHUNK_BYTES, tokens * shape.vocab_size * FLOAT)
    head = shape.vocab_size * shape.hidden_size * FLOAT if trains_head else 0.0
    return 5 * chunk + head + 3 * tokens * shape.hidden_size * FLOAT


def teacher_bytes(mode: str, counts: Counts, width: float, processes: int) -> tuple[float, float]:
    """Bytes of the frozen teacher's weights, of ``width`` each, on a device, and in the CPU's memory: ``whole``;
    ``sharded``, with two blocks and the head gathered; ``offload``, two blocks and what is in none on the device;
    ``offline``, none."""
    if mode == "sharded":
        return width * (counts.teacher / processes + 2 * counts.teacher_block + counts.teacher_head), 0.0
    if mode == "offload":
        blocks = counts.teacher - counts.teacher_ends
        return width * (min(2 * counts.teacher_block, blocks) + counts.teacher_ends), width * blocks
    return (width * counts.teacher if mode == "whole" else 0.0), 0.0


def stored_bytes(config: RunConfig, tokens: int) -> float:
    """Bytes, before they are compressed, of an offline teacher's logits of ``tokens`` targets: a token, a
    log-probability in half precision for each of the top k; a position and the rest's mass."""
    return tokens * (6.0 * config.train.teacher_top_k + 8)


def footprint(config: RunConfig, shape: Any, mixers: list[str], counts: Counts, processes: int) -> Footprint:
    """What one of ``processes`` devices holds in a step of a training, as ``config.engine`` shares it."""
    engine, train = config.engine, config.train
    stage, ddp = zero_stage(engine), engine_of(engine, processes) == "ddp"
    half = 2.0 if config.dtype == "bfloat16" else FLOAT
    rows = max(train.batch_size // train.gradient_accumulation // processes, 1)
    tokens = rows * config.data.sequence_length
    gathered = FLOAT * (2 * counts.block + counts.embeddings)
    weights = FLOAT * counts.student if stage < 3 else FLOAT * counts.student / processes + gathered
    if half < FLOAT and stage < 3:
        weights += half * counts.student  # what autocast keeps of the products' weights for one forward
    gradients = FLOAT * counts.trained * (2 if ddp else 1)  # and the buckets that DDP sends
    gradients /= processes if stage >= 2 else 1
    gradients += FLOAT * buffered(engine, shape.hidden_size)
    masters = FLOAT if engine.name == "deepspeed" else 0.0
    optimizer = (2 * FLOAT + masters) * counts.trained / (processes if stage >= 1 else 1)
    teacher, waiting = teacher_bytes(teacher_mode_of(train, engine), counts, half, processes)
    away_optimizer, away_weights = offloaded(engine)
    host = {"optimizer": optimizer} if away_optimizer else {}
    if waiting:
        host["teacher"] = waiting
    if away_weights:
        host["weights"], weights = weights - gathered, gathered
    kept = activations(config, shape, mixers, tokens)
    loss = loss_bytes(shape, tokens, "embeddings" not in train.freeze)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 0.0 if away_optimizer else optimizer,
        "activations": kept,
        "loss": loss,
        "teacher": teacher,
    }
    both = kept + loss + gradients if train.gradient_accumulation > 1 or ddp else max(kept + loss, gradients)
    return Footprint(parts, host, weights + parts["optimizer"] + teacher + both)


def alternatives(config: RunConfig, processes: int) -> list[tuple[str, RunConfig, int]]:
    """Ways to less memory a device, those that cost least first: what to set, the config with it, the processes."""
    train, engine = config.train, config.engine
    rows = max(train.batch_size // processes, 1)
    lean = replace(train, gradient_checkpointing=True, gradient_accumulation=rows)
    checkpointing, accumulation = "train.gradient_checkpointing=true", f"train.gradient_accumulation={rows}"
    steps = {
        checkpointing: replace(train, gradient_checkpointing=True),
        accumulation: replace(train, gradient_accumulation=rows),
        f"{checkpointing} {accumulation}": lean,
    }
    found = [(name, replace(config, train=tried), processes) for name, tried in steps.items() if tried != train]
    whole = teacher_mode_of(train, engine) == "whole"
    for name, tried in {"": train, f"{checkpointing} {accumulation} ": lean}.items() if whole else ():
        away = replace(config, train=replace(tried, teacher_mode="offload"))
        found.append((f"{name}train.teacher_mode=offload", away, processes))
    for name in ("zero2", "zero3", "zero3_offload") if processes > 1 else ("zero3_offload",):
        if train.teacher_mode == "sharded" and not name.startswith("zero3"):
            continue
        shared = replace(config, engine=replace(engine, name="deepspeed", config=name))
        found.append((f"engine.name=deepspeed engine.config={name}", shared, processes))
        more = f"engine.name=deepspeed engine.config={name} {checkpointing} {accumulation}"
        found.append((more, replace(shared, train=lean), processes))
        if train.teacher_mode == "whole" and name == "zero3":
            parts = replace(shared, train=replace(lean, teacher_mode="sharded"))
            found.append((f"{more} train.teacher_mode=sharded", parts, processes))
    for times in (2, 4, 8, 16, 32, 64):
        if train.batch_size % (processes * times * train.gradient_accumulation) == 0:
            shared = replace(config, engine=replace(engine, name="deepspeed", config="zero3"))
            name = f"{processes * times} devices with engine.name=deepspeed engine.config=zero3 {checkpointing}"
            found.append((name, replace(shared, train=steps[checkpointing]), processes * times))
    if train.teacher_mode != "offline":
        for name, tried in {"": train, f"{checkpointing} {accumulation} ": lean}.items():
            stored = replace(config, train=replace(tried, teacher_mode="offline"))
            found.append((f"{name}train.teacher_mode=offline, an approximation,", stored, processes))
    return found
