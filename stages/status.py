"""How a run stands: what its folder holds, and what the scheduler says of its jobs, in one table.

    distill status runs/demo

CONFIG or RUN, submitted or not. Without a scheduler the table shows the run folder's records alone.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import lock
from stages import ledger
from stages.common import say
from stages.jobs import AGAIN, Job, jobs_of, ranges
from stages.lineage import stages_of
from stages.plan import teacher_config
from stages.slurm import SchedulerError, Task
from stages.targets import read_config

UNSUCCESSFUL = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass(frozen=True)
class Row:
    """How one job stands: what the run folder holds of its work, and the scheduler's word."""

    job: Job
    work: str
    """``done``, ``3 of 10``, ``step 120 of 200`` or ``-``."""
    id: str = ""
    state: str = ""
    elapsed: str = ""
    nodes: str = ""
    why: str = ""
    log: str = ""

    @property
    def done(self) -> bool:
        return self.work == "done"


def main(args: argparse.Namespace) -> int:
    config = read_config(args.target, args.overrides)
    run = Path(config.run_dir).expanduser().absolute()
    stages = stages_of(config, teacher_config(config))
    steps = {stage.folder: stage.steps for stage in stages}
    asked, notes = True, []
    try:
        standing = ledger.standing(run)
    except SchedulerError as error:
        standing, asked = {}, False
        notes.append(f"the run folder's records alone: {error}")
    jobs = jobs_of(config, run, stages)
    left = {job.key: job for job in ledger.left(run, jobs)}
    works = [work(run, job, left.get(job.key), steps.get(job.key.partition("/")[0], 0)) for job in jobs]
    rows = [row(run, job, done, standing.get(job.key, [])) for job, done in zip(jobs, works, strict=True)]
    say(table(rows))
    found = lock.holder(run / "run.lock")
    if found is not None and found[0] and not found[0]["job"]:
        notes.append(f"the folder is held by {found[0]['command']} (host {found[0]['host']}, pid {found[0]['pid']})")
    for line in [*notes, *advice(run, rows, asked)]:
        say(line)
    return 0


def row(run: Path, job: Job, work: str, tasks: Sequence[Task]) -> Row:
    """One row of the table: what the folder holds of the job's work, and the scheduler's ``tasks`` of it."""
    submitted = [entry for entry in ledger.entries(run) if entry.key == job.key]
    if not submitted:
        return Row(job, work)
    newest = submitted[-1].id
    if not tasks:  # forgotten by the scheduler, or it is not here: what the job itself wrote down
        codes = ledger.exit_codes(run, job, newest)
        failed = [code for code in codes.values() if code and code not in AGAIN]
        state = f"exit code {failed[0]}" if failed else "ended" if codes else ""
        label = next((label for label, code in codes.items() if code in failed), str(newest))
        return Row(job, work, label, state, log=log_of(run, job, label))
    bad = next((task for task in tasks if task.state in UNSUCCESSFUL), None)
    shown = bad or next((task for task in tasks if task.live), tasks[-1])
    states = Counter(task.state for task in tasks)
    state = shown.state if len(states) == 1 else ", ".join(f"{count} {name}" for name, count in states.most_common())
    label = str(shown.id) if bad is None else bad.label
    return Row(job, work, label, state, shown.elapsed, shown.nodes, shown.reason, log_of(run, job, shown.label))


def log_of(run: Path, job: Job, label: str) -> str:
    """Where a job, or a task of an array, prints to."""
    return str(ledger.jobs_folder(run) / f"{job.file}-{label}.out")


def work(run: Path, job: Job, left: Job | None, steps: int) -> str:
    """What the run folder holds of a job's work; ``left`` is what it lacks, ``steps`` are those of the training."""
    if left is None and not job.tasks:
        return "done"
    scored = len(job.tasks) - len(left.tasks if left else ())
    if job.tasks and scored:
        return "done" if left is None else f"{scored} of {len(job.tasks)}"
    if job.kind == "train" and (step := ledger.steps_trained(run, job)):
        return f"step {step} of {steps}"
    return "-"


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [("step", "work", "job", "state", "time", "nodes", "why")]
    lines += [(row.job.key, row.work, row.id, row.state, row.elapsed, row.nodes, row.why) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths if width), *padded[1:]])


def advice(run: Path, rows: Sequence[Row], asked: bool) -> list[str]:
    """What failed and what to do next."""
    again = f"distill submit {shlex.quote(str(run))}"
    if all(row.done for row in rows):
        return [f"everything is finished: {run / 'report' / 'report.html'}"]
    broken = [row for row in rows if not row.done and has_failed(row)]
    if broken:
        first = broken[0]
        lines = [f"{first.job.key} has not succeeded ({first.state}); its log ends:", *tail(Path(first.log))]
        lines.append(f"log: {first.log}")
        if missing := ledger.unscored(run, first.job):
            stage = int(first.job.key.split("-")[0])
            alone = f"distill score {shlex.quote(str(run))} --stage {stage} --candidate {missing[0]}"
            lines.append(f"candidates without a score: {ranges(missing)}; one alone: {alone}")
        return [*lines, f"mend it, then: {again}   (what is finished stands)"]
    moving = [row for row in rows if row.state and not row.done]
    return [] if moving or not asked else [f"nothing of it is submitted: {again}"]


def has_failed(row: Row) -> bool:
    """Whether the job of a row has ended without success."""
    return any(name in row.state for name in (*UNSUCCESSFUL, "exit code"))


def tail(log: Path, lines: int = 4) -> list[str]:
    """The last lines of a log, indented."""
    if not log.is_file():
        return ["  (there is no log: it did not start)"]
    return [f"  {line}" for line in log.read_text(errors="replace").rstrip().split("\n")[-lines:]]
