"""The jobs of a run and their sbatch text, line by line: pure functions, no scheduler."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
from pathlib import Path

import pytest

from distill.config import MmrConfig, RunConfig, ScoreConfig, SlurmConfig
from distill.config_merge import dump_config, load_config
from distill.schedule import Stage, Start
from stages.cli import main
from stages.jobs import Job, batch_script, chain, ranges, script, whole_scores
from stages.targets import config_path

RUN = Path("/runs/r")
FIRST = Stage(index=0, replaced=25, num_blocks=50, scorer="loo", steps=10, tokens=10)
SECOND = Stage(
    index=1, replaced=27, num_blocks=50, scorer="mmr", steps=10, tokens=10, start=Start("H1-25/50", 25, stage=0)
)
CLUSTER = SlurmConfig(
    partition="gpu",
    light_partition="cpu",
    account="lab",
    qos="high",
    time="48:00:00",
    nodes=2,
    gpus_per_node=8,
    gres="gpu:h100",
    cpus_per_task=64,
    memory="0",
    task_memory="100G",
    modules=["cuda/12.8", "nccl"],
    setup=["source env/bin/activate"],
    python="python",
    options=["--constraint=ib"],
    srun=["--kill-on-bad-exit"],
    grace=120,
    requeues=7,
    candidates_at_once=4,
)


def job(kind: str) -> Job:
    return next(job for job in chain("r", RUN, [FIRST, SECOND]) if job.kind == kind)


def text(slurm: SlurmConfig, kind: str, folder: Path = RUN / "jobs") -> list[str]:
    return batch_script(slurm, job(kind), folder).splitlines()


def test_the_chain_has_a_job_a_step_and_a_task_a_candidate() -> None:
    jobs = chain("r", RUN, [FIRST, SECOND])
    stages = [
        f"{folder}/{kind}" for folder in ("01-H1-25", "02-H1-27") for kind in ("score", "swap", "train", "measure")
    ]
    assert [job.key for job in jobs] == [*stages, "report"]
    assert [job.name for job in jobs[:2]] == ["r-01-H1-25-score", "r-01-H1-25-swap"]
    assert jobs[0].tasks == tuple(range(50)) and jobs[4].tasks == tuple(range(25)), (
        "the blocks that have attention then"
    )
    assert not any(job.tasks for job in jobs if job.kind != "score")
    assert jobs[5].commands == tuple((verb, "/runs/r", "--stage", "2") for verb in ("score", "place", "swap"))
    assert jobs[-1].commands == (("report", "/runs/r"),)


def test_a_training_asks_for_all_it_is_given() -> None:
    lines = text(CLUSTER, "train")
    assert lines[: lines.index("")] == [
        "#!/bin/bash",
        "#SBATCH --job-name=r-01-H1-25-train",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --gres=gpu:h100:8",
        "#SBATCH --mem=0",
        "#SBATCH --time=48:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=high",
        "#SBATCH --output=/runs/r/jobs/01-H1-25-train-%j.out",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --constraint=ib",
    ]
    body = lines[lines.index("") + 1 :]
    assert body[:3] == [
        "set -e",
        "record=/runs/r/jobs/01-H1-25-train-$SLURM_JOB_ID.exit",
        "trap 'echo $? > \"$record\"' EXIT",
    ]
    assert body[5:9] == [
        "trap pass_on USR1",
        "trap : TERM",
        "module load cuda/12.8 nccl",
        "source env/bin/activate",
    ]
    launch = (
        "exec python -m distill.launch --nnodes=2 --nproc-per-node=8 --node-rank=$SLURM_NODEID "
        "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT -m stages.cli train /runs/r --stage 1"
    )
    assert f"srun --cpus-per-task=64 --kill-on-bad-exit bash -c '{launch}' &" in body
    assert "MASTER_ADDR=$(scontrol show hostnames | head -n 1)" in body
    assert '    scontrol requeue "$SLURM_JOB_ID"' in body
    assert any("@(75|138|143)" in line for line in body)
    assert any("== RUNNING ]]" in line for line in body), "what is being cancelled is not put back"
    assert any("${SLURM_RESTART_COUNT:-0} < 7" in line for line in body)


def test_a_candidate_takes_one_gpu_and_its_share_of_the_node() -> None:
    lines = text(CLUSTER, "score")
    for line in (
        "#SBATCH --nodes=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gres=gpu:h100:1",
        "#SBATCH --mem=100G",
        "#SBATCH --array=0-49%4",
        "#SBATCH --output=/runs/r/jobs/01-H1-25-score-%A_%a.out",
    ):
        assert line in lines
    assert lines[-1] == 'python -m stages.cli score /runs/r --stage 1 --candidate "$SLURM_ARRAY_TASK_ID"'
    assert not any("--signal" in line or "requeue" in line.lower().removeprefix("#sbatch --requeue") for line in lines)


def test_the_report_asks_for_little() -> None:
    lines = text(CLUSTER, "report")
    assert "#SBATCH --partition=cpu" in lines and "#SBATCH --mem=8G" in lines and "#SBATCH --time=01:00:00" in lines
    assert not any("gres" in line or "gpus" in line for line in lines)


def test_defaults_ask_for_no_more_than_they_must() -> None:
    lines = text(SlurmConfig(python="python"), "train")
    options = [line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    for absent in ("--partition", "--account", "--qos", "--gres", "--gpus-per-node", "--array"):
        assert absent not in options
    assert "srun --cpus-per-task=2 python -m stages.cli train /runs/r --stage 1 &" in lines, "one process: no torchrun"


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_one_process_of_an_engine_that_needs_a_launcher_gets_one(engine: str) -> None:
    jobs = chain("r", RUN, [FIRST], engine)
    lines = batch_script(SlurmConfig(python="python"), next(job for job in jobs if job.kind == "train"), RUN)
    assert "exec python -m distill.launch --nnodes=1 --nproc-per-node=1 --node-rank=$SLURM_NODEID" in lines
    assert "MASTER_PORT=" in lines
    others = [batch_script(SlurmConfig(), job, RUN) for job in jobs if job.kind != "train"]
    assert not any("distill.launch" in text for text in others)


def test_a_container_is_put_before_the_command_alone() -> None:
    slurm = SlurmConfig(container="apptainer exec --nv /images/d.sif", gpus_per_node=1)
    assert text(slurm, "measure")[-1] == (
        "apptainer exec --nv /images/d.sif python -m stages.cli measure /runs/r --stage 1"
    )
    trains = text(slurm, "train")
    assert (
        "srun --cpus-per-task=2 apptainer exec --nv /images/d.sif python -m stages.cli train /runs/r --stage 1 &"
        in trains
    )
    assert '    scontrol requeue "$SLURM_JOB_ID"' in trains, "the image needs no scheduler"


def test_names_with_spaces_and_signs_stay_one_word() -> None:
    run = Path("/runs/my run's 50% & $more")
    jobs = chain("my run", run, [FIRST])
    lines = batch_script(SlurmConfig(python="/opt/my python"), jobs[2], run / "jobs").splitlines()
    found = {key: shlex.split(line)[1] for line in lines if line.startswith("#SBATCH") for key in [line.split("=")[0]]}
    assert found["#SBATCH --job-name"] == "--job-name=my run-01-H1-25-train"
    assert found["#SBATCH --output"] == "--output=/runs/my run's 50%% & $more/jobs/01-H1-25-train-%j.out"
    command = next(line for line in lines if line.startswith("srun")).removesuffix(" &")
    assert shlex.split(command)[2:6] == ["/opt/my python", "-m", "stages.cli", "train"]
    assert shlex.split(command)[6] == str(run)


@pytest.mark.parametrize("kind", ["score", "swap", "train", "measure", "report"])
def test_every_script_is_bash(kind: str) -> None:
    found = "\n".join(text(CLUSTER, kind))
    assert subprocess.run(["bash", "-n"], input=found, text=True, capture_output=True).stderr == ""


def ran(tmp_path: Path, job_exit: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, the scheduler's commands, and the record of a training whose ranks do ``job_exit``."""
    calls, stand_ins = tmp_path / "calls", tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "srun").write_text(f"#!/bin/bash\n{job_exit}\n")
    (stand_ins / "scontrol").write_text(f'#!/bin/bash\necho scontrol "$@" >> {calls}\n')
    (stand_ins / "squeue").write_text(f"#!/bin/bash\ncat {tmp_path}/state\n")
    for each in stand_ins.iterdir():
        each.chmod(0o755)
    state = environment.pop("state", "RUNNING")
    (tmp_path / "state").write_text(state)
    done = subprocess.run(
        ["bash"],
        input="\n".join(text(SlurmConfig(requeues=3), "train", tmp_path)),
        text=True,
        env={"PATH": f"{stand_ins}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **environment},
        timeout=30,
    )
    record = (tmp_path / "01-H1-25-train-7.exit").read_text().strip()
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], record


@pytest.mark.parametrize(
    ("ranks", "environment", "code", "requeued"),
    [
        ("exit 0", {}, 0, False),
        ("exit 75", {}, 75, True),  # a checkpoint is written
        ("kill -USR1 $$", {}, 138, True),  # before there was anything to write
        ("exit 143", {}, 143, True),
        ("exit 75", {"state": "COMPLETING"}, 75, False),  # being cancelled
        ("exit 75", {"SLURM_RESTART_COUNT": "3"}, 75, False),  # often enough
        ("exit 2", {}, 2, False),  # a user's mistake
        ("kill -TERM $PPID; sleep 0.2; exit 143", {"state": "COMPLETING"}, 143, False),  # the ranks are waited for
        ("exit 1", {}, 1, False),
        (
            "trap '' USR1; kill -USR1 $PPID; sleep 0.2; exit 1",
            {},
            1,
            True,
        ),  # asked for a checkpoint; a launcher hides the ranks' code
        ("trap '' USR1; kill -USR1 $PPID; sleep 0.2; exit 2", {}, 2, False),
        (
            "trap 'exit 75' USR1; kill -USR1 $PPID; for i in {1..99}; do sleep 0.1; done",
            {},
            75,
            True,
        ),  # it is passed on
        ("trap '' USR1; kill -USR1 $PPID; sleep 0.2; exit 0", {}, 0, False),
    ],
)
def test_a_training_that_was_stopped_goes_back_to_the_queue(
    ranks: str, environment: dict[str, str], code: int, requeued: bool, tmp_path: Path
) -> None:
    found, calls, record = ran(tmp_path, ranks, **environment)
    assert (found, record) == (code, str(code))
    assert calls == (["scontrol requeue 7"] if requeued else [])


def test_ranges() -> None:
    assert ranges([0, 1, 2, 3]) == "0-3" and ranges([0, 2, 3, 7]) == "0,2-3,7" and ranges([4]) == "4"


def test_the_whole_script_chains_every_job_and_is_bash() -> None:
    jobs = chain("r", RUN, [FIRST, SECOND])
    found = script(CLUSTER, jobs, RUN, "version: 1\nname: r\n")
    for number in range(2, len(jobs) + 1):
        assert (
            f"job{number}=$(sbatch --parsable --dependency=afterok:$job{number - 1} --kill-on-invalid-dep=yes" in found
        )
    assert found.count("sbatch --parsable") == len(jobs) == 9
    assert "cat > /runs/r/run.yaml <<'END'\nversion: 1\nname: r\nEND\n" in found
    assert subprocess.run(["bash", "-n"], input=found, text=True, capture_output=True).stderr == ""


def test_dry_run_prints_the_jobs_of_the_paper_offline_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["submit", "apriel_h1_15b", f"run_dir={tmp_path}/run", "--dry-run", "--cluster", "h100"]) == 0
    found = capsys.readouterr().out
    assert found.startswith("#!/bin/bash\n") and found.count("sbatch --parsable") == 6 * 4 + 1
    arrays = [line for line in found.splitlines() if line.startswith("#SBATCH --array")]
    assert arrays == [f"#SBATCH --array=0-{n - 1}%16" for n in (50, 25, 23, 20, 16, 13)]
    assert "#SBATCH --partition=h100" in found and "module load cuda/12.8" in found
    assert "--nnodes=4 --nproc-per-node=8" in found, "nodes are the run's, the site's file leaves them alone"
    assert "\nthreads: 8\n" in found, "64 cores, which the config itself asks for, shared by 8 GPUs"
    assert not list(tmp_path.iterdir())


def test_defaults_cluster_config_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each stands above the one before."""
    (tmp_path / "site.yaml").write_text("partition: batch\ntime: '00:10:00'\nqos: low\nmodules: [a, b]\n")
    own = f"teacher: embedded\nslurm: {{cluster: {tmp_path}/site.yaml, qos: high, time: '00:20:00'}}\n"
    (tmp_path / "my.yaml").write_text(own)
    assert main(["submit", f"{tmp_path}/my.yaml", "--dry-run", "slurm.time=00:05:00"]) == 0
    found = capsys.readouterr().out
    assert "#SBATCH --partition=batch" in found and "module load a b" in found, "the cluster's"
    assert "#SBATCH --qos=high" in found and "=low" not in found, "the config's"
    times = {line for line in found.splitlines() if "--time=" in line}
    assert times == {"#SBATCH --time=00:05:00", "#SBATCH --time=01:00:00"}, "the command line's; light jobs' own"


def test_a_run_that_was_begun_by_hand_still_gets_its_cluster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``distill score my.yaml`` writes every key to run.yaml, those that nobody set among them."""
    (tmp_path / "site.yaml").write_text("partition: batch\nqos: low\n")
    (tmp_path / "other.yaml").write_text("qos: best\n")
    config = load_config(RunConfig, config_path("smoke"), [f"slurm={{cluster: {tmp_path}/site.yaml, account: lab}}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text(dump_config(config))
    assert main(["submit", f"{tmp_path}/run", "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "--partition=batch" in found and "--qos=low" in found and "--account=lab" in found
    assert main(["submit", f"{tmp_path}/run", "--dry-run", "--cluster", f"{tmp_path}/other.yaml"]) == 0
    assert "--qos=best" in capsys.readouterr().out


def test_candidates_that_are_scored_together_get_no_array() -> None:
    assert whole_scores(ScoreConfig()) == set()
    whole = whole_scores(ScoreConfig(mmr=MmrConfig(halving=True)))
    assert whole == {"mmr"}
    jobs = {job.key: job for job in chain("r", RUN, [FIRST, SECOND], whole=whole)}
    assert jobs["01-H1-25/score"].tasks == tuple(range(50)) and jobs["02-H1-27/score"].tasks == ()
    lines = batch_script(SlurmConfig(), jobs["02-H1-27/score"], RUN / "jobs").split("\n")
    assert lines[-1].endswith("score /runs/r --stage 2") and not any("--array" in line for line in lines)
    listed = dataclasses.replace(SECOND, listed=3)
    assert chain("r", RUN, [listed])[0].tasks == (0, 1, 2)
