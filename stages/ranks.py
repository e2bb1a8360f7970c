"""A verb in a job of several processes: the first does it, the others train with it where it trains.

    torchrun --nproc-per-node 2 -m stages.cli run demo
    python -m distill.launch --nproc-per-node 2 -m stages.cli run demo       # with the exit codes of distill

The first process is the only one that writes, holds the lock and decides; the others wait for a training, load their
part of it from the run folder (which all nodes have to see), and wait again, until they are told the exit code.
"""

from __future__ import annotations

import importlib
import sys
import time

import torch

from distill import distributed, interrupt
from distill.config import RunConfig
from distill.engine import NEED_LAUNCHER, check_engine, engine_of
from distill.errors import UserError
from distill.schedule import Stage
from stages.common import open_run
from stages.context import Context

LOST = interrupt.LOST
TRAINS = ("run", "train", "sft")
"""Verbs that all processes have work in."""


def check_job(config: RunConfig, verb: str) -> None:
    """Raise UserError where the processes of this job cannot do the trainings of a run."""
    world = distributed.size()
    if verb not in TRAINS:
        return
    check_engine(config.engine, config.train, config.dtype, world, "sft" if verb == "sft" else "train")
    if config.engine.name == "fsdp" and config.engine.config == "offload" and not torch.cuda.is_available():
        raise UserError("engine.config=offload moves weights off a GPU, and there is none here: set engine.config=full")
    if config.engine.name == "fsdp" and not torch.cuda.is_available() and config.kernels != "reference":
        raise UserError(
            f"engine.name=fsdp on a CPU with kernels={config.kernels}: compiled kernels hold on to memory that FSDP2 "
            "gives back; set kernels=reference, or engine.name=ddp"
        )
    if engine_of(config.engine, world) in NEED_LAUNCHER and distributed.job() is None:
        raise UserError(
            f"engine.name={config.engine.name} shares a training among processes, and this is none that a launcher "
            f"started: torchrun --nproc-per-node N -m stages.cli {verb} ... (N may be 1)"
        )


def share(context: Context, stage: Stage, work: str) -> None:
    """Have the other processes of the job take part in a training of ``stage`` (``work``: a key of ``WORK``)."""
    if (job := distributed.job()) is not None and job.rank == 0:
        job.post({"work": work, "run": str(context.run_dir.absolute()), "stage": stage.index})


def follow() -> int:
    """Take part in what the first process posts, until it ends; the exit code that it ended with."""
    job = distributed.join()
    with interrupt.deferred(for_another=True):  # the first process hears of a signal, and decides
        while "end" not in (task := job.next_task()):
            try:
                context = open_run(task["run"], [], write=False)
                module = importlib.import_module(f"stages.{task['work']}")
                module.take_part(context, context.stages[task["stage"]])
            except interrupt.Stopped:
                continue
            except UserError as error:
                return told(job, error)
    time.sleep(distributed.BEAT)  # the launcher ends the others as soon as one has ended with an error
    return int(task["end"])


def told(job: distributed.Job, error: UserError) -> int:
    """A mistake that the first process has met, too, is told by it alone."""
    code = job.ended(10)
    if code is None:
        print(f"rank {job.rank}: {error}", file=sys.stderr)
    return 2 if code is None else code


def lost(error: BaseException) -> str | None:
    """Which processes are gone, where an error is what a collective says of that; None for other errors. Said by the
    first of those that are left alone, "" by the others."""
    job = distributed.job()
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "gloo", "nccl", "broken pipe", "timed out", "timeout")
    if job is None or not isinstance(error, RuntimeError) or not any(sign in text for sign in signs):
        return None
    if not (gone := job.silent()):
        return None
    if job.rank != min(set(range(job.world)) - set(gone)):
        return ""
    return f"{', '.join(job.name(other) for other in gone)} is gone: the job ends; the same command continues"
