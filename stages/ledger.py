"""Where the jobs of a run stand: what was submitted (``RUN/jobs/jobs.json``), what the scheduler says of it, and what
the run folder holds of their work."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distill.errors import UserError
from distill.records import read_record, write_json
from stages import slurm
from stages.jobs import Job
from stages.slurm import Task


@dataclass(frozen=True)
class Entry:
    """One submission of a job: ``key``, ``name`` and ``tasks`` as in Job, the scheduler's ``id``, what it waits for."""

    key: str
    name: str
    id: int
    tasks: list[int]
    after: list[str]
    submitted: str


def jobs_folder(run: Path) -> Path:
    """Where scripts, logs, exit codes and ids of the jobs are."""
    return run / "jobs"


def entries(run: Path) -> list[Entry]:
    """Every submission for a run, the oldest first."""
    file = jobs_folder(run) / "jobs.json"
    if not file.is_file():
        return []
    try:
        return [Entry(**each) for each in read_record(file, jobs=list)["jobs"]]
    except TypeError as error:
        raise UserError(f"{file} is broken: {error}\nremove it; jobs that still run are seen with squeue") from error


def note(run: Path, job: Job, number: int, after: Sequence[str]) -> None:
    """Add a submission."""
    entry = Entry(job.key, job.name, number, list(job.tasks), list(after), time.strftime("%Y-%m-%d %H:%M:%S"))
    write_json(jobs_folder(run) / "jobs.json", {"jobs": [asdict(each) for each in (*entries(run), entry)]})


def standing(run: Path) -> dict[str, list[Task]]:
    """What the scheduler knows of the run's jobs, by key of the job; of what was submitted again, the newest.

    Raises SchedulerError where it cannot be asked.
    """
    submitted = entries(run)
    keys = {(entry.id, entry.name): entry.key for entry in submitted}
    newest: dict[str, dict[int | None, Task]] = {}
    for task in sorted(slurm.tasks(entry.id for entry in submitted), key=lambda task: task.id):
        if key := keys.get((task.id, task.name)):
            newest.setdefault(key, {})[task.index] = task
    return {key: list(found.values()) for key, found in newest.items()}


def exit_codes(run: Path, job: Job, number: int) -> dict[str, int]:
    """By label (``12``, ``12_3``), what a job or a task wrote down as it ended; a killed one writes nothing."""
    files = jobs_folder(run).glob(f"{job.file}-{number}{'_*' if job.tasks else ''}.exit")
    codes = {file.stem.removeprefix(f"{job.file}-"): file.read_text().strip() for file in sorted(files)}
    return {label: int(code) for label, code in codes.items() if code.isdecimal()}


def left(run: Path, jobs: Sequence[Job]) -> list[Job]:
    """What of the jobs the run folder lacks; of a job array the candidates that have no score."""
    wanted: list[Job] = []
    for job in jobs:
        if job.kind == "report":
            page, measures = run / "report" / "report.html", run.glob("stages/*/measure/step.json")
            done = page.is_file() and all(page.stat().st_mtime >= each.stat().st_mtime for each in measures)
            if not done or wanted:
                wanted.append(job)
        elif not (step_folder(run, job) / "step.json").is_file():
            tasks = tuple(unscored(run, job))
            if tasks or not job.tasks:
                wanted.append(replace(job, tasks=tasks))
    return wanted


def unscored(run: Path, job: Job) -> list[int]:
    """Of a job array, the candidates of which there is no score with the inputs that the step was begun with."""
    partial = partial_folder(run, job)
    made_with = _fingerprint(partial / "inputs.json")
    parts = {index: _fingerprint(partial / "candidates" / f"{index:03d}.json") for index in job.tasks}
    return [index for index in job.tasks if made_with is None or parts[index] != made_with]


def steps_trained(run: Path, job: Job) -> int:
    """The last step in the log of an unfinished training."""
    log = partial_folder(run, job) / "log.jsonl"
    steps = [0]
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            steps.append(int(json.loads(line).get("step", 0)))
        except ValueError:  # a torn line is what a kill leaves
            continue
    return max(steps)


def step_folder(run: Path, job: Job) -> Path:
    """What the job's last step writes."""
    return run / "stages" / job.key


def partial_folder(run: Path, job: Job) -> Path:
    """Where that is built."""
    folder = step_folder(run, job)
    return folder.with_name(folder.name + ".partial")


def _fingerprint(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or torn: not made
        return None
