"""The loss and its gradients are those of the global batch: over ranks, accumulation steps and unequal valid counts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from distill.config import MixerConfig
from distill.data.pack import IGNORE, collate
from distill.hybrid.surgery import hybridize

ROOT = Path(__file__).parents[1]
TAU = 1.5


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student, and eight rows whose valid counts all differ; two rows, and a whole micro-batch, have none."""
    folder = tmp_path_factory.mktemp("global")
    llama = make_llama()
    llama.save_pretrained(folder / "teacher")
    hybridize(llama, ["mamba2", "attention", "attention", "attention"], MixerConfig(), seed=0).save_pretrained(
        folder / "student"
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(8):
        ids = torch.randint(0, llama.config.vocab_size, (24,), generator=generator)
        labels = ids.clone()
        labels[: 2 + 3 * number] = IGNORE  # what is left: 22, 19, ... targets
        if number in (2, 5):
            labels[:] = IGNORE
        rows.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(24)})
    torch.save(rows, folder / "rows.pt")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """By plain autograd over full logits of all rows at once, in float64."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name).double() for name in ("student", "teacher"))
    batch = collate(torch.load(folder / "rows.pt"))
    labels = batch.pop("labels")
    keep = labels[:, 1:] != IGNORE
    log_q, log_p = (
        log_softmax(model(**batch, use_cache=False).logits[:, :-1][keep] / TAU, -1) for model in (student, teacher)
    )
    log_p = log_p.detach()
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    target = -log_q.gather(1, labels[:, 1:][keep].unsqueeze(1)).squeeze(1)
    loss = (0.7 * reverse + 0.2 * forward + 0.1 * target).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_those_of_the_global_batch(folder: Path, expected: Any, ranks: int) -> None:
    launch(folder, ranks)
    check(folder, expected, str(ranks))


@pytest.mark.deepspeed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install 'distill-hybrid[deepspeed]'")
def test_gradients_reach_a_head_in_parts(folder: Path, expected: Any) -> None:
    """Under ZeRO-3, the teacher's head in parts too: each is gathered around the chunks."""
    launch(folder, 2, "zero3")
    check(folder, expected, "zero3-2")


def launch(folder: Path, ranks: int, *engine: str) -> None:
    """Run the worker on so many real processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += [str(Path(__file__).with_name("global_batch_worker.py")), str(folder), *engine]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def check(folder: Path, expected: tuple[float, dict[str, torch.Tensor]], prefix: str) -> None:
    """That what the workers wrote is what was expected, with 1 and 4 accumulation steps."""
    loss, gradients = expected
    for accumulation in (1, 4):
        found = torch.load(folder / f"{prefix}-{accumulation}.pt")
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["gradients"].keys() == gradients.keys()
        ours, plain = (
            torch.cat([each[name].double().flatten() for name in gradients]) for each in (found["gradients"], gradients)
        )
        error = ((ours - plain).norm() / plain.norm()).item()
        assert error < 1e-6, f"{prefix} ranks, {accumulation} accumulation steps"
