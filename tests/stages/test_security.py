"""What a model, a name or a record cannot do: run code, or write elsewhere (SECURITY.md)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from distill.errors import UserError
from eval import accuracy, suites
from stages.cli import main

Build = Callable[[list[str]], list[str]]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}


def test_nothing_that_is_kept_is_a_pickle(tiny: Path) -> None:
    files = [path for path in (tiny / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 4
    assert not [path for path in files if path.suffix in PICKLES]


def test_what_a_training_resumes_from_is_read_without_objects_and_only_from_its_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = build(["train", "{tmp}/no_train", "train.save_steps=1", "--stage", "1"])
    log, load, loaded = transformers.Trainer.log, torch.load, []

    def poisoned(self: Any, logs: dict[str, float], *args: Any) -> None:
        log(self, {**logs, "loss": float("nan")} if self.state.global_step == 2 else logs, *args)

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append((Path(file), kwargs.get("weights_only")))
        return load(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "log", poisoned)
        assert main(command) == 2
    monkeypatch.setattr(torch, "load", watched)
    assert main(command) == 0
    assert {path.name for path, _ in loaded} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(weights_only is True for _, weights_only in loaded)
    assert all(path.is_relative_to(tmp_path / "no_train/stages/01-H1-1/train.partial") for path, _ in loaded)
    assert not list((tmp_path / "no_train").rglob("*.pt"))


def test_a_job_script_takes_names_and_paths_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script is run by bash with an sbatch that keeps what it is given: nothing but its text arrives."""
    monkeypatch.chdir(tmp_path)
    name, folder = """it's $(touch ran) `touch ran` "b";touch ran""", f"{tmp_path}/a b $(touch ran)'"
    overrides = [f"name={json.dumps(name)}", f'run_dir="{folder}"', "slurm.partition='p $(touch ran)'", "schedule=[5]"]
    assert main(["submit", "demo", *overrides, "--dry-run"]) == 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\ncat >> jobs; echo 1\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = capsys.readouterr().out
    done = subprocess.run(["bash"], input=script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(folder) / "jobs").is_dir() and yaml.safe_load((Path(folder) / "run.yaml").read_text())["name"] == name
    assert not list(tmp_path.rglob("ran"))
    lines = (tmp_path / "jobs").read_text().splitlines()
    given = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH ")]
    assert all(len(each) == 1 for each in given), "each option is one word"
    options = [each[0] for each in given]
    assert f"--job-name={name}-01-H1-5-score" in options
    assert "--partition=p $(touch ran)" in options
    assert f"--output={folder}/jobs/report-%j.out" in options
    commands = [shlex.split(line) for line in lines if "-m stages.cli" in line]
    assert len(commands) >= 5 and all(command[command.index("stages.cli") + 2] == folder for command in commands)


@pytest.mark.parametrize("task", ["humaneval", "mbpp", "humaneval_plus"])
def test_tasks_that_run_code_need_consent(task: str) -> None:
    with pytest.raises(UserError, match="allow_code_execution=true"):
        suites.check_tasks(["embedded_add", task], "generative", allow_code=False)
    suites.check_tasks(["embedded_add", task], "generative", allow_code=True)


def test_a_group_with_a_task_that_runs_code_needs_consent() -> None:
    class Entry:
        def __init__(self, cfg: Any, tags: set[str] | None = None) -> None:
            self.cfg, self.tags = cfg, tags or set()

    index = {
        "code": Entry({"task": "code", "unsafe_code": True}),
        "sums": Entry({"task": "sums"}),
        "group": Entry({"group": "group", "task": ["sums", {"group": "inner", "task": ["code"]}]}),
        "inner": Entry({"group": "inner", "task": ["code"]}),
        "tag": Entry(None, {"sums", "code"}),
        "inline": Entry({"group": "inline", "task": [{"task": "new", "unsafe_code": True}]}),
        "fine": Entry({"group": "fine", "task": ["sums"]}),
    }
    leaves = {name: [leaf for leaf in suites.leaves(index, name) if leaf.get("unsafe_code")] for name in index}
    found = {name: unsafe[0]["task"] if unsafe else None for name, unsafe in leaves.items()}
    assert found == {
        "code": "code", "sums": None, "group": "code", "inner": "code", "tag": "code", "inline": "new", "fine": None,
    }  # fmt: skip


def test_consent_to_run_code_ends_with_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "HF_ALLOW_CODE_EVAL"
    monkeypatch.setenv(variable, "1")
    with accuracy.code_execution(False):
        assert variable not in os.environ, "the config's word counts, not a variable that happens to be set"
    assert os.environ[variable] == "1"
    monkeypatch.delenv(variable)
    with accuracy.code_execution(True):
        assert os.environ[variable] == "1"
    assert variable not in os.environ
