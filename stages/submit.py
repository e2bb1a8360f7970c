"""Print the SLURM jobs of a run: one job a step, each after the one before it.

    distill submit configs/apriel_h1_15b.yaml --dry-run | less

CONFIG or RUN. What is printed is a shell script that submits every job with its dependency. Submission by this
command itself comes later; until then review the script and pipe it to bash.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass

from distill.config import RunConfig, SlurmConfig
from distill.errors import UserError
from stages.common import say
from stages.lineage import stages_of
from stages.plan import teacher_config
from stages.targets import read_config

STEPS = ("score", "place", "swap", "train", "measure")
ON_ONE_CORE = ("place",)  # steps without a model


@dataclass(frozen=True)
class Job:
    """One job: a verb on the run, and the job that must have succeeded before it."""

    name: str
    command: str
    after: str | None
    step: str


def main(args: argparse.Namespace) -> int:
    config = read_config(args.target, args.overrides)
    names = [(s.folder, s.name) for s in stages_of(config, teacher_config(config))]
    jobs = jobs_of(config, args.target, args.overrides, names)
    if not args.dry_run:
        raise UserError(
            f"submission comes later: add --dry-run to print the {len(jobs)} jobs, review them, and pipe them to bash"
        )
    say(script(config, jobs))
    return 0


def jobs_of(config: RunConfig, target: str, overrides: list[str], stages: list[tuple[str, str]]) -> list[Job]:
    """Every job of a run in order; each depends on the one before it. ``stages`` are (folder, name)."""
    if not all(part.isprintable() for part in (target, *overrides)):
        raise UserError("a job script holds its command on one line: give what has line breaks in the config's file")
    jobs: list[Job] = []
    given = " ".join(shlex.quote(part) for part in (target, *overrides))
    for folder, name in stages:
        for step in STEPS:
            command = f"distill {step} {given} --stage {name.split('/')[0]}"
            after = jobs[-1].name if jobs else None
            jobs.append(Job(f"{config.name}-{folder}-{step}", command, after, step))
    jobs.append(Job(f"{config.name}-report", f"distill report {given}", jobs[-1].name, "report"))
    return jobs


def batch_script(slurm: SlurmConfig, job: Job, run_dir: str) -> str:
    """The sbatch text of one job."""
    small = job.step in (*ON_ONE_CORE, "report")
    nodes = slurm.nodes if job.step == "train" else 1
    gpus = 0 if small else slurm.gpus_per_node if job.step == "train" else min(slurm.gpus_per_node, 1)
    quote = shlex.quote  # sbatch reads quotes in its lines as a shell does
    lines = ["#!/bin/bash", f"#SBATCH --job-name={quote(job.name)}", f"#SBATCH --nodes={nodes}"]
    lines += ["#SBATCH --ntasks-per-node=1"]
    lines += [f"#SBATCH --cpus-per-task={slurm.cpus_per_task}"]
    lines += [f"#SBATCH --gpus-per-node={gpus}"] if gpus else []
    lines += [f"#SBATCH --mem={quote('8G' if small else slurm.memory)}", f"#SBATCH --time={quote(slurm.time)}"]
    lines += [f"#SBATCH --partition={quote(slurm.partition)}"] if slurm.partition else []
    lines += [f"#SBATCH --account={quote(slurm.account)}"] if slurm.account else []
    lines += [f"#SBATCH --output={quote(f'{run_dir}/slurm/%x-%j.out')}", "", "set -euo pipefail", *slurm.setup]
    command = job.command
    if nodes * gpus > 1:
        command = (
            f"srun --cpus-per-task={slurm.cpus_per_task} torchrun --nnodes={nodes} --nproc-per-node={gpus} "
            '--rdzv-backend=c10d --rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500" '
            f"-m stages.cli {command.removeprefix('distill ')}"
        )
    return "\n".join([*lines, command])


def script(config: RunConfig, jobs: list[Job]) -> str:
    """A shell script that submits all jobs, each with its dependency."""
    number = {job.name: i for i, job in enumerate(jobs, 1)}
    parts = ["#!/bin/bash", "set -euo pipefail", f"mkdir -p {shlex.quote(config.run_dir + '/slurm')}"]
    for job in jobs:
        after = f" --dependency=afterok:$job{number[job.after]} --kill-on-invalid-dep=yes" if job.after else ""
        parts.append(
            f"\n# {number[job.name]}. {job.name}{f', after {job.after}' if job.after else ''}\n"
            f"job{number[job.name]}=$(sbatch --parsable{after} <<'SBATCH'\n"
            f"{batch_script(config.slurm, job, config.run_dir)}\nSBATCH\n)"
        )
    parts.append(f'\necho "submitted {len(jobs)} jobs, $job1 to $job{len(jobs)}"')
    return "\n".join(parts)
