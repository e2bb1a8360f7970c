"""A small run to be killed, starved and damaged, and what it ends with when it is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.records import verify

ROOT = Path(__file__).parents[2]
STAGES = ("01-H1-1", "02-H1-2")
TALLY: dict[str, int] = {}
CLOCKS = ("tokens_per_second", "minutes")
CONFIG = """
name: faults
teacher: {teacher}
schedule: [1, 2]
run_dir: {run}
threads: 1
data: {{sequence_length: 128}}
score:
  loo: {{questions: 10}}
  mmr: {{steps: 2, heldout_tokens: 256}}
train:
  {{steps: 12, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 2, eval_rows: 4, loss: annealed_kl,
    save_steps: 2, keep_steps: [5]}}
measure:
  generative: [embedded_add]
  multiple_choice: [embedded_choice]
  limit: 4
  max_new_tokens: 16
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 32}}
"""


@dataclass
class Lab:
    """The config, the commands, and what the run that nothing happened to ended with."""

    folder: Path
    stages: tuple[str, ...] = STAGES
    tally: dict[str, int] = field(default_factory=lambda: TALLY)
    """``killed`` and ``survived``, for the last line of output."""
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each step took, by its name, and ``report`` and (one) ``checkpoint``."""

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        """``distill run`` in a session of its own, its output in RUN.log."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(run.with_name(run.name + ".log"), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "stages.cli", "run", str(self.config), f"run_dir={run}"],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, run: Path) -> tuple[int, str]:
        """Run to the end; the exit code, and what was said."""
        log = run.with_name(run.name + ".log")
        before = log.stat().st_size if log.exists() else 0
        code = self.start(run).wait()
        return code, log.read_bytes()[before:].decode()

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the whole process group."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def interrupted(self, run: Path, when: Callable[[], bool], number: int = signal.SIGTERM) -> int:
        """Start, send a signal once ``when()``; the exit code."""
        process = self.start(run)
        while process.poll() is None and not when():
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait()

    def differences(self, run: Path) -> list[str]:
        """In what ``run`` ended otherwise than the run that nothing happened to; [] if in nothing."""
        found, expected = results(run), self.expected
        return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))

    def building(self, run: Path, stage: str, since: float = 0.0) -> list[str]:
        """The checkpoints of a stage's training that are being written (in ``partial``, before they get a name).

        ``since``: when the process was started; what an earlier one left half written is older, and does not count.
        """
        train = run / "stages" / stage / "train.partial"
        found: list[str] = []
        for inner in ("checkpoints", "steps", ""):
            with suppress(FileNotFoundError):
                paths = list((train / inner / "partial").iterdir())
                found += [f"{inner}/{path.name}" for path in paths if path.stat().st_mtime > since]
        return found


def results(run: Path) -> dict[str, Any]:
    """Weights as bytes, scores, placements, accuracies, losses: all but what a clock decides. Checksums are checked."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "step.json":
            verify(path.parent)
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.name in ("scores.json", "placement.json", "lineage.json"):
            found[name] = path.read_text()
        elif path.name == "measure.json":
            record = json.loads(path.read_text())
            found[name] = [record["accuracy"], record["by_distance"], record["tokens"]]
        elif path.name in ("train.json", "log.jsonl"):
            events = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else []
            events = events or [json.loads(path.read_text())]
            found[name] = [{key: value for key, value in event.items() if key not in CLOCKS} for event in events]
        elif path.name.endswith("partial") or path.name == "run.lock" or path.name == "report.html":
            found[name] = "there"
    return found


def watch(lab: Lab, process: subprocess.Popen[bytes], run: Path) -> Iterator[float]:
    """Yield how long each checkpoint took to write, until the process ends."""
    began: dict[str, float] = {}
    while process.poll() is None:
        now, present = time.monotonic(), [stage + name for stage in STAGES for name in lab.building(run, stage)]
        for name in present:
            began.setdefault(name, now)
        for name in [name for name in began if name not in present]:
            yield now - began.pop(name)
        time.sleep(0.0005)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The laboratory, its reference run done."""
    lab = Lab(tmp_path_factory.mktemp("faults"))
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1,
        "pad_token_id": 0, "eos_token_id": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(lab.folder / "teacher")
    build_tokenizer().save_pretrained(lab.folder / "teacher")
    run = lab.folder / "alone"
    lab.config.write_text(CONFIG.format(teacher=lab.folder / "teacher", run=run))
    process = lab.start(run)
    writes = sorted(watch(lab, process, run))
    ended = time.time()
    assert process.returncode == 0, run.with_name("alone.log").read_text()[-2000:]
    for path in run.rglob("step.json"):
        record = json.loads(path.read_text())
        lab.seconds[record["step"]] = record["seconds"]
    lab.seconds["report"] = ended - (run / "stages" / STAGES[-1] / "measure/step.json").stat().st_mtime
    lab.seconds["checkpoint"] = writes[len(writes) // 2]
    lab.expected = results(run)
    return lab


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of output."""
    if TALLY:
        print(f"{TALLY['killed']} killed, {TALLY['survived']} survived")
