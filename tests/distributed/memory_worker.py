"""One rank of the trainings whose peaks test_memory.py compares with ``distill plan``.

Usage: python -m distill.launch --nproc-per-node N memory_worker.py FILE ENGINE [CONFIG]; rank 0 writes the bytes that
torch's allocator of the CPU held at most, models included, to FILE.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from distill import distributed
from distill.config import EngineConfig, RunConfig, TrainConfig
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.data.traces import EmbeddedTraces
from distill.engine import sharing, teacher_mode_of
from distill.hybrid.surgery import hybrid_config
from distill.teacher import Teacher
from distill.trainer import DistillTrainer, fit, training_arguments

STEPS, LENGTH = 3, 64


def shape() -> LlamaConfig:
    """A teacher whose weights, gradients and moments are of the size of its activations."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48, "num_hidden_layers": 4}
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 576, "tie_word_embeddings": True}
    return LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=4)


def run_of(name: str, config: str, accumulation: int = 2) -> RunConfig:
    """The run, as ``distill plan`` would be told of it."""
    train = TrainConfig(batch_size=16, gradient_accumulation=accumulation, learning_rate=1e-3, warmup_steps=0)
    run = RunConfig(train=train, engine=EngineConfig(name, config))
    run.data.sequence_length = LENGTH
    return run


def mixers_of(run: RunConfig) -> list[str]:
    """The student's: attention alone under FSDP2, which on a CPU needs the mixers' plain reference; what that keeps is
    not what is planned for."""
    return ["attention"] * 4 if run.engine.name == "fsdp" else ["mamba2", "attention", "mamba2", "attention"]


def train(run: RunConfig, folder: Path) -> None:
    """Three steps, the models made (in parts, if that is how they are trained) on the way."""
    arguments = training_arguments(run.train, STEPS, folder, seed=0, engine=run.engine)
    teacher = AutoModelForCausalLM.from_config(shape())
    student = AutoModelForCausalLM.from_config(hybrid_config(shape(), mixers_of(run), run.mixer)).train()
    rows = EmbeddedTraces(build_tokenizer(), STEPS * run.train.batch_size, LENGTH, {"mod": 1.0}, 0)
    if teacher_mode_of(run.train, run.engine) == "sharded":
        from distill.sharded import ShardedTeacher

        frozen: Teacher = ShardedTeacher(teacher)
    else:
        frozen = Teacher(teacher)
    extra: dict[str, Any] = {"teacher": frozen, "loss": "reverse_kl", "temperature": 1.0}
    fit(DistillTrainer, student, rows, arguments, title="t", log=None, **extra)


def peak(events: Any) -> int:
    """The most that torch's allocator of the CPU held at once, from a profile's memory events."""
    held, most = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    torch.set_num_threads(1)
    run = run_of(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
    job = distributed.join()
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with sharing(run.engine), tempfile.TemporaryDirectory() as folder, profiling as found:
        train(run, Path(folder))
    if job.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(peak(found.profiler.kineto_results.events())))
        job.end(0)
    job.leave()


if __name__ == "__main__":
    main()
