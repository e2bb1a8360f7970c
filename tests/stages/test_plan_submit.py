"""Plan and submit: pure text from a config, offline."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.config import RunConfig, SlurmConfig
from distill.config_merge import load_config
from distill.hybrid.model import FAMILIES
from stages.cli import main
from stages.plan import sizes, teacher_config
from stages.submit import Job, batch_script
from stages.targets import config_path


def test_plan_of_the_paper_works_offline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/apriel_h1_15b.yaml"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith("H1-")]
    assert [row[0] for row in rows] == [f"H1-{h}/50" for h in (25, 27, 30, 34, 37, 40)]
    assert [row[1] for row in rows] == ["loo"] + ["mmr"] * 5
    assert [int(row[2]) for row in rows] == [50, 25, 23, 20, 16, 13], "blocks that still have attention"
    assert "sequence 16,384, batch 64 rows, AdamW at 5e-05" in text
    for word in ("memory", "time", "disk", "14,974.2 M parameters"):
        assert word in text


def test_sizes_are_those_of_the_paper_and_of_real_modules() -> None:
    config = load_config(RunConfig, config_path("apriel_h1_15b"))
    teacher = teacher_config(config)
    size = sizes(config, teacher)
    assert size.attention == 5120 * (4096 + 1024 + 1024 + 4096)
    projections = 5120 * (4096 + 1024 + 1024 + 4096 + 320) + 4096 * 5120
    small = 4096 * 4 + 4096 + 320 * 4096 + 4096 + 4096 * 16 + 4096
    assert size.mixer == projections + small
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(teacher)
    assert size.total == plain.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_knows_every_family(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a config alone, with the head size left to the family; parameters are those of the real modules."""
    keys = "hidden_size: 64, num_hidden_layers: 8, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 99"
    written = f"teacher_config={{model_type: {family}, {keys}, pad_token_id: null, sliding_window: null}}"
    overrides = [written, "schedule=[4,6]", "plan.device_tflops=1"]
    assert main(["plan", "demo", *overrides]) == 0
    text = capsys.readouterr().out
    assert "8 blocks, hidden 64, 4 query / 2 key-value heads of" in text and "H1-6/8" in text
    config = load_config(RunConfig, config_path("demo"), overrides)
    teacher = teacher_config(config)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(teacher)
    assert sizes(config, teacher).total == plain.num_parameters()


def test_plan_writes_nothing(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", f"run_dir={tmp_path}/run"]) == 0
    assert "measured now" in capsys.readouterr().out
    import pathlib

    assert not (pathlib.Path(str(tmp_path)) / "run").exists()


def test_batch_script_text() -> None:
    slurm = SlurmConfig(partition="gpu", nodes=2, gpus_per_node=8, cpus_per_task=64, setup=["source env/bin/activate"])
    job = Job("r-01-H1-25-train", "distill train r.yaml --stage H1-25", None, "train")
    assert batch_script(slurm, job, "runs/r").splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=r-01-H1-25-train",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --mem=0",
        "#SBATCH --time=24:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --output=runs/r/slurm/%x-%j.out",
        "",
        "set -euo pipefail",
        "source env/bin/activate",
        "srun --cpus-per-task=64 torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d "
        '--rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500" '
        "-m stages.cli train r.yaml --stage H1-25",
    ]
    place = batch_script(slurm, Job("p", "distill place r.yaml --stage H1-25", "x", "place"), "runs/r")
    assert "gpus" not in place
    assert place.endswith("\ndistill place r.yaml --stage H1-25")


def test_submit_chains_one_job_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "demo", "name=my run", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("sbatch --parsable") == 4 * 5 + 1
    assert text.count("#SBATCH --job-name=") == 4 * 5 + 1
    for job in range(2, 12):
        assert f"job{job}=$(sbatch --parsable --dependency=afterok:$job{job - 1} --kill-on-invalid-dep=yes" in text
    assert "distill score demo 'name=my run' --stage H1-5\n" in text
    assert "distill report demo 'name=my run'\n" in text
