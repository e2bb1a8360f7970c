"""The jobs of a run, and their sbatch scripts, as pure text.

One job a step, each after the one before it: ``score`` (a job array with a task for each candidate, where these can be
scored apart), ``swap``, ``train`` and ``measure`` for every stage, then ``report``. Joining the scores, choosing the
blocks and swapping them share one job: the first two take seconds, and would each wait in the queue for longer than
they work.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import interrupt
from distill.config import RunConfig, ScoreConfig, SlurmConfig
from distill.engine import NEED_LAUNCHER
from distill.errors import UserError
from distill.importance.comparison import entries
from distill.schedule import Stage

VERBS = {"score": ("score",), "swap": ("score", "place", "swap"), "train": ("train",), "measure": ("measure",)}
"""What the jobs of a stage do, in order."""
LIGHT = ("report",)
"""Jobs that work on no model."""
AGAIN = (interrupt.AGAIN, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""Exit codes of a training that has written a checkpoint, or had nothing to lose yet: it is to be run again."""
LISTENING = [
    "asked= ranks=",
    'pass_on() { asked=yes; if [[ -n $ranks ]]; then kill -USR1 "$ranks" 2> /dev/null || true; fi; }',
    "trap pass_on USR1",
    "trap : TERM",  # a cancellation's, which the ranks get from the scheduler; two signals would end them at once
]
WAITING = [  # a signal cuts `wait` short; the last one gives the code, or 127 where it was given before
    "code=0",
    'wait "$ranks" || code=$?',
    'while kill -0 "$ranks" 2> /dev/null; do code=0; wait "$ranks" || code=$?; done',
    "last=0",
    'wait "$ranks" 2> /dev/null || last=$?',
    "if [[ $last != 127 ]]; then code=$last; fi",
]
PORT = 29500
"""The first of a thousand that rank 0 may listen on."""


@dataclass(frozen=True)
class Job:
    """One job of a run.

    Attributes:
        key: ``01-H1-5/train``, or ``report``.
        name: what the scheduler calls it.
        commands: arguments of ``distill``, one command after the other.
        tasks: indices of a job array: places of candidates among the blocks that still have attention.
        launched: a launcher starts its process even where it is a single one.
    """

    key: str
    name: str
    commands: tuple[tuple[str, ...], ...]
    tasks: tuple[int, ...] = ()
    launched: bool = False

    @property
    def kind(self) -> str:
        """``score``, ``swap``, ``train``, ``measure`` or ``report``."""
        return self.key.rpartition("/")[2]

    @property
    def file(self) -> str:
        """``01-H1-5-train``: what its script and logs are called."""
        return self.key.replace("/", "-")


def whole_scores(score: ScoreConfig) -> set[str]:
    """Of the scores of a run, those whose candidates are not scored apart: they get one job, and no array."""
    return {name for name in (score.first, score.later) if not entries(score, name)[0].apart}


def chain(
    name: str, run: Path, stages: Sequence[Stage], engine: str = "auto", whole: Collection[str] = ()
) -> list[Job]:
    """Every job of a run, in order; each waits for the one before it. ``run`` is the run folder, ``engine`` what its
    trainings are shared by, ``whole`` as in ``whole_scores``."""
    jobs: list[Job] = []
    for stage in stages:
        for kind, verbs in VERBS.items():
            commands = tuple((verb, str(run), "--stage", str(stage.index + 1)) for verb in verbs)
            tasks = tuple(range(stage.candidates)) if kind == "score" and stage.scorer not in whole else ()
            launched = kind == "train" and engine in NEED_LAUNCHER
            jobs.append(Job(f"{stage.folder}/{kind}", f"{name}-{stage.folder}-{kind}", commands, tasks, launched))
    jobs.append(Job("report", f"{name}-report", (("report", str(run)),)))
    return jobs


def jobs_of(config: RunConfig, run: Path, stages: Sequence[Stage]) -> list[Job]:
    """The jobs of the run in the folder ``run``."""
    return chain(config.name, run, stages, config.engine.name, whole_scores(config.score))


def batch_script(slurm: SlurmConfig, job: Job, folder: Path) -> str:
    """The sbatch text of one job; what it prints and how it ended goes to ``folder``."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(slurm, job, folder)), "", "set -e"]
    label = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.tasks else "$SLURM_JOB_ID"
    lines += [f"record={shlex.quote(str(folder / job.file))}-{label}.exit", "trap 'echo $? > \"$record\"' EXIT"]
    lines += LISTENING if job.kind == "train" else []
    lines += [f"module load {shlex.join(slurm.modules)}"] if slurm.modules else []
    lines += slurm.setup
    if job.kind == "train":
        return "\n".join([*lines, *training(slurm, job)])
    for command in job.commands:
        task = ' --candidate "$SLURM_ARRAY_TASK_ID"' if job.tasks else ""
        lines.append(f"{python(slurm)} -m stages.cli {shlex.join(command)}{task}")
    return "\n".join(lines)


def options(slurm: SlurmConfig, job: Job, folder: Path) -> list[str]:
    """What the job asks of the scheduler. sbatch reads quotes in its lines as a shell does, and % in a file's name."""
    light, train = job.kind in LIGHT, job.kind == "train"
    share = max(slurm.gpus_per_node, 1)
    gpus = slurm.gpus_per_node if train else min(slurm.gpus_per_node, 1 - light)
    memory = slurm.memory if train else slurm.light_memory if light else slurm.task_memory
    partition = (slurm.light_partition if light else "") or slurm.partition
    logs = str(folder).replace("%", "%%") + "/" + job.file
    found = [
        ("job-name", job.name),
        ("nodes", slurm.nodes if train else 1),
        ("ntasks-per-node", 1),
        ("cpus-per-task", slurm.cpus_per_task if train else max(slurm.cpus_per_task // share, 1)),
        (("gres", f"{slurm.gres}:{gpus}") if slurm.gres else ("gpus-per-node", gpus)) if gpus else ("", ""),
        ("mem", memory),
        ("time", slurm.light_time if light else slurm.time),
        ("partition", partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("array", ranges(job.tasks) + (f"%{slurm.candidates_at_once}" if slurm.candidates_at_once else ""))
        if job.tasks
        else ("", ""),
        ("output", f"{logs}-%A_%a.out" if job.tasks else f"{logs}-%j.out"),
        ("signal", f"B:USR1@{slurm.grace}" if train else ""),
    ]
    lines = [f"--{key}={shlex.quote(str(value))}" for key, value in found if value != ""]
    return [*lines, "--open-mode=append", "--requeue", *slurm.options]


def training(slurm: SlurmConfig, job: Job) -> list[str]:
    """The lines that train on every node, pass a signal on to the ranks, and go on in a new start after a checkpoint.

    The scheduler signals this shell before the time limit (and before a preemption, where the site has set
    ``preempt_send_user_signal``), or the steps themselves. A job that is being cancelled is not put back in the queue.
    """
    (command,) = job.commands
    program, ranks = f"-m stages.cli {shlex.join(command)}", max(slurm.gpus_per_node, 1)
    lines: list[str] = []
    if launched := job.launched or slurm.nodes * ranks > 1:
        program = (
            f"-m distill.launch --nnodes={slurm.nodes} --nproc-per-node={ranks} --node-rank=$SLURM_NODEID "
            f"--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT {program}"
        )
        lines = ["export MASTER_ADDR MASTER_PORT", "MASTER_ADDR=$(scontrol show hostnames | head -n 1)"]
        lines += [f"MASTER_PORT=$(({PORT} + SLURM_JOB_ID % 1000))"]
    program = f"{python(slurm)} {program}"
    if launched:  # which node this is, only a shell there can say
        program = f"bash -c {shlex.quote(f'exec {program}')}"
    srun = " ".join(["srun", f"--cpus-per-task={slurm.cpus_per_task}", *slurm.srun])
    codes = "|".join(str(code) for code in AGAIN)
    return [
        *lines,
        f"{srun} {program} &",
        "ranks=$!",
        'if [[ -n $asked ]]; then kill -USR1 "$ranks" || true; fi',
        *WAITING,
        f"if [[ $code == @({codes}) || ( -n $asked && $code != @(0|2) ) ]] &&",
        '    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] &&',
        f"    (( ${{SLURM_RESTART_COUNT:-0}} < {slurm.requeues} )); then",
        '    echo "exit code $code: back to the queue, to go on from the newest checkpoint"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]


def python(slurm: SlurmConfig) -> str:
    """The interpreter of a job, in its container if there is one."""
    if slurm.container:
        return f"{slurm.container} {shlex.quote(slurm.python or 'python')}"
    return shlex.quote(slurm.python or sys.executable)


def ranges(tasks: Sequence[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for task in tasks:
        if parts and task == parts[-1][-1] + 1:
            parts[-1].append(task)
        else:
            parts.append([task])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def script(slurm: SlurmConfig, jobs: Sequence[Job], run: Path, settings: str) -> str:
    """A shell script that does what ``distill submit`` does: the run's ``settings`` (run.yaml), then every job with
    its dependency."""
    if "\nEND\n" in settings or any(not str(part).isprintable() for part in (run, *slurm.options, *slurm.srun)):
        raise UserError("a path or an option of slurm holds a line break: a job script could not hold it")
    folder = run / "jobs"
    parts = ["#!/bin/bash", f"# {len(jobs)} jobs", "set -euo pipefail", f"mkdir -p {shlex.quote(str(folder))}"]
    parts.append(f"cat > {shlex.quote(str(run / 'run.yaml'))} <<'END'\n{settings}END")
    for number, job in enumerate(jobs, 1):
        after = f" --dependency=afterok:$job{number - 1} --kill-on-invalid-dep=yes" if number > 1 else ""
        parts.append(f"\n# {number}. {job.name}\njob{number}=$(sbatch --parsable{after} <<'END'")
        parts.append(f"{batch_script(slurm, job, folder)}\nEND\n)")
    parts.append(f'\necho "submitted {len(jobs)} jobs, $job1 to $job{len(jobs)}"' if jobs else "\n# nothing is left")
    return "\n".join(parts)
