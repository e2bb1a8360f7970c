"""Submit a run to SLURM: one job a step, each after the one before it.

    distill submit configs/apriel_h1_15b.yaml --cluster h100
    distill submit configs/apriel_h1_15b.yaml --dry-run | less

CONFIG or RUN. Scores come from a job array, a task for each block that still has attention; a training runs on
``slurm.nodes`` nodes, writes a checkpoint before its time is up or it is preempted, and goes on in a new start. A step
that fails holds those after it: mend what it says, and submit again. What is finished is not submitted, what is under
way is not doubled. ``--cluster`` names a file of ``configs/cluster`` (or a path): what a site sets once for all.
Scripts, logs and job ids go to ``RUN/jobs``; see ``distill status RUN`` and ``distill cancel RUN``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

from distill import lock
from distill.config import VERSION, RunConfig, SlurmConfig
from distill.config_merge import dump_config, load_config, merge_config, read_yaml
from distill.engine import check_engine
from distill.errors import UserError, nearest
from distill.records import differences, write_text
from distill.teacher import load_config as load_model_config
from stages import ledger, slurm
from stages.common import check_finished, check_inputs, open_run, say
from stages.jobs import Job, batch_script, jobs_of, script
from stages.lineage import stages_of
from stages.plan import teacher_config
from stages.slurm import SchedulerError, Task
from stages.speedup import settle
from stages.targets import check, read_config


def main(args: argparse.Namespace) -> int:
    if not all(part.isprintable() for part in (args.target, *args.overrides)):
        raise UserError("a job script holds each value on one line: give what has line breaks in the config's file")
    config = configured(args)
    run = Path(config.run_dir).expanduser().absolute()
    if args.dry_run:
        teacher = teacher_config(config)
        settle(config, teacher, lambda line: say(f"# {line}"))
        jobs = ledger.left(run, jobs_of(config, run, stages_of(config, teacher)))
        say(script(config.slurm, jobs, run, settings(config)))
        return 0
    try:
        slurm.check_partitions([config.slurm.partition, config.slurm.light_partition])
        submit(args, config, run)
    except SchedulerError as error:
        raise SchedulerError(f"{error}\n(--dry-run prints the scripts, without a scheduler)") from error
    return 0


def submit(args: argparse.Namespace, config: RunConfig, run: Path) -> None:
    """Submit what is left of a run and not under way; everything that can be checked is, before anything is written."""
    world = config.slurm.nodes * max(config.slurm.gpus_per_node, 1)
    check_engine(config.engine, config.train, config.dtype, world)
    context = open_run(args.target, args.overrides, write=False, config=config)
    check_inputs(config, load_model_config(config.teacher))
    check_finished(context, [], force=False)
    jobs = jobs_of(config, run, context.stages)
    known, standing = ledger.entries(run), ledger.standing(run)
    live = {key: found for key, tasks in standing.items() if (found := [task for task in tasks if task.live])}
    check_free(run, config, [task for tasks in live.values() for task in tasks])
    for step in (context.step(stage, "score") for stage in context.stages):
        if step.partial.exists():
            step.part()  # candidates that were scored with other inputs count no more
    left = {job.key: job for job in ledger.left(run, jobs)}
    for kind, job in {job.kind: job for job in left.values()}.items():
        try:
            slurm.try_out(batch_script(config.slurm, job, ledger.jobs_folder(run)))
        except SchedulerError as error:
            raise SchedulerError(f"the scheduler refuses a job of kind '{kind}': {error}") from error
    ledger.jobs_folder(run).mkdir(parents=True, exist_ok=True)
    lock.hold(ledger.jobs_folder(run) / "submit.lock", f"{run}: its submission")
    if ledger.entries(run) != known:
        raise UserError(f"{run} was being submitted by another command at the same time: see distill status {run}")
    write_text(run / "run.yaml", settings(config))
    if not submit_chain(config, run, jobs, left, live):
        say(f"nothing to submit: {'jobs are under way' if live else 'everything is finished'}")
    say(f"distill status {run}")


def submit_chain(
    config: RunConfig, run: Path, jobs: list[Job], left: dict[str, Job], live: dict[str, list[Task]]
) -> int:
    """Submit what is ``left`` of the jobs and not ``live``, each after the one before it; how many those were.

    What waits for a job that is submitted again would wait for ever, and is cancelled and submitted again, too.
    """
    count, after = 0, list[str]()
    for job in jobs:
        working = live.get(job.key, [])
        if count:
            waiting = [task for task in working if task.state == "PENDING"]
            slurm.cancel([task.label for task in waiting])
            working = [task for task in working if task not in waiting]
        labels = [task.label for task in working]
        if job.key not in left:  # finished: a job of it may be about to end
            after = labels or after
            continue
        if working:
            say(f"{job.key}: under way ({', '.join(labels)})")
        tasks = sorted(set(left[job.key].tasks) - {task.index for task in working})
        if tasks or not working:
            labels.append(str(send(config, run, replace(job, tasks=tuple(tasks)), after)))
            count += 1
        after = labels
    return count


def send(config: RunConfig, run: Path, job: Job, after: list[str]) -> int:
    """Submit one job and note its id, with its script beside it."""
    folder = ledger.jobs_folder(run)
    text = batch_script(config.slurm, job, folder)
    write_text(folder / f"{job.file}.sh", text + "\n")
    try:
        number = slurm.submit(text + "\n", after)
    except SchedulerError as error:
        raise SchedulerError(
            f"{job.key}: {error}\nwhat was submitted before it stands; submit again to go on"
        ) from error
    ledger.note(run, job, number, after)
    tasks = f", {len(job.tasks)} tasks" if job.tasks else ""
    say(f"{job.key}: job {number}{tasks}" + (f", after {', '.join(after)}" if after else ""))
    return number


def check_free(run: Path, config: RunConfig, live: list[Task]) -> None:
    """Raise UserError where a process that is none of the run's own jobs works on the run folder, or where jobs under
    way were submitted with other settings."""
    found = lock.holder(run / "run.lock")
    if found is None or found[0].get("job") not in {str(number) for task in live for number in (task.id, task.label)}:
        lock.check(run / "run.lock", str(run))
    if live and (run / "run.yaml").is_file():
        old, new = asdict(load_config(RunConfig, run / "run.yaml")), asdict(config)
        for each in (old, new):
            del each["slurm"], each["plan"], each["run_dir"]
        if changed := differences(old, new):
            labels = [str(number) for number in dict.fromkeys(task.id for task in live)]
            raise UserError(
                f"{run} has jobs under way that were submitted with other settings ({', '.join(labels[:4])}"
                f"{', ...' if len(labels) > 4 else ''}):\n  " + "\n  ".join(changed[:2]) + "\n"
                f"cancel them first (distill cancel {run}), or take another run_dir"
            )


def configured(args: argparse.Namespace) -> RunConfig:
    """The config: defaults < the cluster's file < what the config itself sets of ``slurm`` < the command line; but a
    RUN for which ``--cluster`` names another site takes all that this site's file says. Threads are those of a job:
    a run keeps their number."""
    config = read_config(args.target, args.overrides)
    if name := args.cluster or config.slurm.cluster:
        file, usual = cluster_file(name), asdict(SlurmConfig())
        own = {key: value for key, value in asdict(config.slurm).items() if value != usual[key]}
        if args.cluster and Path(args.target).expanduser().is_dir():
            own = {}
        layers = [
            (args.target, asdict(config)),
            (str(file), {"slurm": read_yaml(file)}),
            (args.target, {"slurm": {**own, "cluster": name}}),
        ]
        config = merge_config(RunConfig, layers, [text for text in args.overrides if text.startswith("slurm.")])
        check(config)
    existing = Path(config.run_dir).expanduser() / "run.yaml"
    if not config.threads:
        share = max(config.slurm.cpus_per_task // max(config.slurm.gpus_per_node, 1), 1)
        config.threads = (load_config(RunConfig, existing).threads if existing.is_file() else 0) or share
    return config


def cluster_file(name: str) -> Path:
    """The file of a cluster: a path, or the short name of one that we ship."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = {each.stem: each for each in sorted(Path(str(resources.files("configs"))).glob("cluster/*.yaml"))}
    if name not in shipped:
        raise UserError(
            f"no cluster '{name}'{nearest(name, shipped)}; give a YAML file or one of: {', '.join(shipped)}"
        )
    return shipped[name]


def settings(config: RunConfig) -> str:
    """``run.yaml`` of the run."""
    return f"version: {VERSION}\n{dump_config(config)}"
