"""The scheduler's commands: asked with a time limit, what they refuse turned into one message."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill.errors import UserError, brief, nearest

TIMEOUT = 60.0
"""Seconds that a command may take."""
SETTLING = 10.0
"""Seconds to wait for jobs that are on their way from one state to another."""
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
AWAY = ("contact slurm", "onnect", "timed out", "process configuration", "resolve")
"""What the commands say where the scheduler cannot be reached."""
NEVER = "DependencyNeverSatisfied"


class SchedulerError(UserError):
    """The scheduler is not there, does not answer, or refuses."""


@dataclass(frozen=True)
class Task:
    """A job as the scheduler knows it, or one task of a job array (``index``)."""

    id: int
    index: int | None
    name: str
    state: str
    elapsed: str
    nodes: str
    reason: str

    @property
    def live(self) -> bool:
        """Whether it waits or works, and may yet succeed."""
        return self.state not in ENDED and self.reason != NEVER

    @property
    def label(self) -> str:
        """``12``, or ``12_3`` for a task of an array."""
        return str(self.id) if self.index is None else f"{self.id}_{self.index}"


def ask(*command: str, text: str | None = None) -> str:
    """What a command of the scheduler prints; SchedulerError where it is not there, fails, or takes too long."""
    name = command[0]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise SchedulerError(
            f"no scheduler here: {name} is not on PATH. Do this on a login node of the cluster (perhaps after "
            "'module load slurm')"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"the scheduler does not answer: {name} took over {TIMEOUT:.0f} s; try again") from None
    if done.returncode:
        said = brief(done.stderr or done.stdout or f"exit code {done.returncode}")
        if any(sign in said for sign in AWAY):
            said = f"the scheduler does not answer: {said}\nis this a login node, and is the cluster up?"
        raise SchedulerError(said)
    return done.stdout


def check_partitions(names: Iterable[str]) -> None:
    """Raise UserError where the scheduler does not answer, or has no partition of one of the ``names``."""
    known = sorted(set(ask("sinfo", "--noheader", "--all", "--format=%R").split()))
    for name in names:
        for each in filter(None, name.split(",")):
            if each not in known:
                raise UserError(
                    f"slurm.partition={each}: this cluster has no such partition{nearest(each, known)}; it has "
                    f"{', '.join(known) or 'none'}"
                )


def try_out(script: str) -> None:
    """Raise SchedulerError where the scheduler would refuse the job: ``sbatch --test-only``."""
    ask("sbatch", "--test-only", text=script)


def submit(script: str, after: Sequence[str]) -> int:
    """Submit a job that is to start once all of ``after`` have succeeded, and to go where one has not; its id."""
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return int(ask("sbatch", "--parsable", *waits, text=script).split(";")[0])


def cancel(labels: Sequence[str]) -> None:
    """Cancel jobs or tasks of arrays."""
    if labels:
        ask("scancel", *labels)


def tasks(ids: Iterable[int]) -> list[Task]:
    """What the scheduler knows of jobs: of those that it has not yet forgotten, and of the others what accounting
    (where the site keeps it) has of them."""
    wanted = sorted(set(ids))
    if not wanted:
        return []
    until, found = time.monotonic() + SETTLING, _queued(wanted)
    while any(task.state == "COMPLETING" for task in found) and time.monotonic() < until:
        time.sleep(0.5)
        found = _queued(wanted)
    known = {task.id for task in found}
    return [*found, *_accounted([each for each in wanted if each not in known])]


def _queued(ids: Sequence[int]) -> list[Task]:
    form = "--format=%F|%K|%T|%M|%N|%r|%j"
    try:
        lines = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(map(str, ids))}", form)
    except SchedulerError as error:
        if "Invalid job id" in str(error):  # it has forgotten all of them
            return []
        raise
    found = []
    for line in lines.splitlines():
        number, index, state, elapsed, nodes, reason, name = line.split("|", 6)
        found.append(Task(int(number), _index(index), name, state, elapsed, nodes, reason if reason != "None" else ""))
    return found


def _accounted(ids: Sequence[int]) -> list[Task]:
    if not ids:
        return []
    form = "--format=JobID,State,Elapsed,NodeList,JobName"
    try:
        lines = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(map(str, ids))}", form)
    except SchedulerError as error:
        if "accounting storage is disabled" in str(error) or "no scheduler here" in str(error):
            return []
        raise
    found = []
    for line in lines.splitlines():
        label, state, elapsed, nodes, name = line.split("|", 4)
        number, _, index = label.partition("_")
        found.append(Task(int(number), _index(index), name, state.split()[0], elapsed, nodes, ""))
    return found


def _index(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
