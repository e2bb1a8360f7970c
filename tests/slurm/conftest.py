"""A real Slurm on loopback for the length of the session: set up by up.sh, stopped again whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer

ROOT = Path(__file__).parents[2]
UP = Path(__file__).with_name("up.sh")
CONFIG = """
name: small
teacher: {folder}/teacher
schedule: [1, 2]
run_dir: {folder}/plain
threads: 1
data: {{sequence_length: 128}}
score: {{loo: {{questions: 20}}, mmr: {{steps: 2, heldout_tokens: 512}}}}
train: {{steps_by_stage: [{long}, 4], batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4,
  save_steps: 1000}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 2
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 16}}
slurm: {{cluster: loopback}}
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Slurm is up: nodes n1 and n2, partitions main (preempted) and urgent."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("a Slurm on loopback needs root and apt")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # MariaDB's own user must come by, which pytest's folders forbid
    root.chmod(0o755)
    environment = {"SLURM_ROOT": str(root), "SLURM_CONF": f"{root}/etc/slurm.conf", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(key, value)
        try:
            subprocess.run([UP, "install"], check=True)
            subprocess.run([UP, "up"], check=True)
            yield
        finally:
            subprocess.run([UP, "down"], check=True)
            shutil.rmtree(root)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a small run, with its teacher beside it; its first training takes some ten seconds."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, tie_word_embeddings=True, **shape, **heads))
    model.save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "small.yaml").write_text(CONFIG.format(folder=folder, long=400))
    return folder / "small.yaml"


def distill(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``distill`` as a user calls it."""
    command = [sys.executable, "-m", "stages.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def ask(*command: object) -> str:
    """What a command of Slurm prints; on a busy machine the controller may miss a first call."""
    for patience in (10, 20, 0):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode == 0 or "timed out" not in done.stderr:
            break
        time.sleep(patience)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(what: str, condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until ``condition()`` is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not after {seconds} s\n{ask('squeue', '--states=all')}"
        time.sleep(0.5)
