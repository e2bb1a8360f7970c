"""One short distillation of the embedded teacher as a claim needs it: an arm, its figures, and where they are kept.

An arm is trained on one thread, so that its figures do not depend on how many run side by side. What has been run
is read back from ``runs/claims``; ``docs/claims.json`` holds what the document shows.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import set_seed

from distill.config import MeasureConfig, MixerConfig, TrainConfig
from distill.data.traces import EmbeddedTraces
from distill.hybrid.surgery import hybridize
from distill.placement import ATTENTION
from distill.placement import replace as placed
from distill.records import fingerprint, read_json, write_json
from distill.teacher import RememberingTeacher, load_model, load_tokenizer
from distill.trainer import DistillTrainer, fit, heldout_loss, training_arguments
from eval import accuracy

BLOCKS = 10
LENGTH = 128
MIX = {"add": 1.0, "mod": 1.0, "chase": 1.5, "recall": 1.5, "sort": 1.0}
HELD_OUT_SEED = 90_001
HELD_OUT_ROWS = 128  # 16,384 tokens


@dataclass(frozen=True)
class Arm:
    """One distillation: which blocks, from what, how, how long.

    ``start`` is the arm that this one starts from (staged); its blocks stay replaced. Tokens of an arm are
    ``steps * batch_size * 128``, those of its start come on top.
    """

    blocks: tuple[int, ...]
    seed: int = 0
    steps: int = 100
    batch_size: int = 8
    loss: str = "reverse_kl"
    learning_rate: float = 1e-3
    mixer_learning_rate: float = 0.0
    init: str = "mil"
    mil_layout: str = "aligned"
    z_init: str = "default"
    conv_init: str = "default"
    trainable: str = "all"
    generate: bool = True
    start: Arm | None = None

    @property
    def name(self) -> str:
        """A hash of everything that the figures depend on."""
        return fingerprint(asdict(self))[:16]

    @property
    def tokens(self) -> int:
        """Tokens along the lineage."""
        return self.steps * self.batch_size * LENGTH + (self.start.tokens if self.start else 0)


class Bench:
    """A teacher and its data, loaded once a process; remembers the teacher's answers for one seed at a time.

    Args:
        folder: where what was run is kept.
        teacher: ``embedded``, or a folder; ``mix``: the families that it was trained on, by weight.
        tasks: what generates, ``limit`` questions a task (0: all).
        rows: held-out rows on which the losses are taken.
    """

    def __init__(
        self,
        folder: Path,
        teacher: str = "embedded",
        mix: Mapping[str, float] = MIX,
        tasks: Sequence[str] = ("embedded_generative",),
        limit: int = 0,
        rows: int = HELD_OUT_ROWS,
    ) -> None:
        torch.set_num_threads(1)
        self.folder, self.mix = folder, mix
        self.asked = MeasureConfig(generative=list(tasks), multiple_choice=[], limit=limit, batch_size=500)
        self.tokenizer = load_tokenizer(teacher)
        self.model = load_model(teacher)
        self.teacher = RememberingTeacher(self.model)
        self.seed: tuple[int, int] | None = None
        self.heldout = EmbeddedTraces(self.tokenizer, rows, LENGTH, mix, HELD_OUT_SEED, held_out=True)

    def run(self, arm: Arm) -> dict[str, Any]:
        """Train and measure an arm (its start first), or read back what was found before."""
        record = self.folder / f"{arm.name}.json"
        if record.is_file():
            found: dict[str, Any] = read_json(record)
            return found
        if arm.start is not None:
            self.run(arm.start)
        student, result = self.figures(arm)
        student.save_pretrained(self.folder / arm.name)
        write_json(record, result)
        return result

    def figures(self, arm: Arm) -> tuple[Any, dict[str, Any]]:
        """Train and measure an arm whose start is there: the student and its figures."""
        if self.seed != (arm.seed, arm.batch_size):
            self.seed, self.teacher = (arm.seed, arm.batch_size), RememberingTeacher(self.model)
        began = time.monotonic()
        set_seed(arm.seed)
        mixer = MixerConfig(init=arm.init, mil_layout=arm.mil_layout, z_init=arm.z_init, conv_init=arm.conv_init)
        before, mixers = self.model, [ATTENTION] * self.model.config.num_hidden_layers
        if arm.start is not None:
            before = load_model(str(self.folder / arm.start.name))
            mixers = list(before.config.mixers)
        student = hybridize(before, placed(mixers, arm.blocks, "mamba1"), mixer, seed=arm.seed)
        student.requires_grad_(True).train()
        start = self.losses(student)
        if arm.trainable == "mixer":
            student.requires_grad_(False)
            for block in arm.blocks:
                student.model.layers[block].self_attn.requires_grad_(True)
        data_seed = arm.seed * 1000 + (arm.tokens if arm.start else 0)  # a later stage sees other rows
        rows = EmbeddedTraces(self.tokenizer, arm.steps * arm.batch_size, LENGTH, self.mix, data_seed)
        train = TrainConfig(
            batch_size=arm.batch_size, learning_rate=arm.learning_rate, warmup_steps=min(10, arm.steps // 10)
        )
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            fit(
                DistillTrainer, student, rows, training_arguments(train, arm.steps, Path(scratch), arm.seed),
                title="", log=None, teacher=self.teacher, loss=arm.loss, temperature=1.0,
                mixer_learning_rate=arm.mixer_learning_rate,
            )  # fmt: skip
        trained = time.monotonic() - began
        student.eval()
        result = {"arm": asdict(arm), "tokens": arm.tokens, "start": start, "end": self.losses(student)}
        if arm.generate:
            result |= self.answers(student)
        result |= {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
        return student, result

    def answers(self, model: Any) -> dict[str, Any]:
        """Accuracy of generated answers by family, and their mean."""
        scores = accuracy.evaluate(model, self.tokenizer, self.asked)
        families = {row["task"]: row["value"] for row in scores.rows}
        return {"families": families, "accuracy": mean(families.values())}

    def losses(self, student: Any) -> dict[str, float]:
        """Held-out KL in both directions, nats a target token."""
        return {
            loss: heldout_loss(student, self.teacher, self.heldout, 16, loss, 1.0)
            for loss in ("reverse_kl", "forward_kl")
        }


_bench: Bench | None = None


def _work(arm: Arm, folder: Path) -> dict[str, Any]:
    """Run one arm in a worker process."""
    global _bench
    if _bench is None:
        from stages.cli import quiet

        quiet()
        _bench = Bench(folder)
    return _bench.run(arm)


def run_all(arms: Sequence[Arm], folder: Path, jobs: int) -> dict[Arm, dict[str, Any]]:
    """Figures of every arm; those not yet known are run in ``jobs`` processes of one thread each.

    Arms that others start from come first, then seed by seed, so that the teacher's answers are used again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = list(dict.fromkeys(arms))
    results = {arm: read_json(path) for arm in wanted if (path := folder / f"{arm.name}.json").is_file()}
    left = [arm for arm in wanted if arm not in results]
    began, total = time.monotonic(), len(left)
    for rank in range(max((depth(arm) for arm in left), default=-1) + 1):
        # an unfinished start of a wanted arm is run with it; starts of equal depth never run twice at once
        level = sorted(
            {ancestor(arm, rank) for arm in left if depth(arm) >= rank}, key=lambda a: (a.seed, a.batch_size)
        )
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(_work, arm, folder): arm for arm in level}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done = sum(arm in results for arm in left)
                print(f"  {done}/{total} arms, {time.monotonic() - began:.0f} s", flush=True)
    return results


def depth(arm: Arm) -> int:
    """How many arms come before this one."""
    return 0 if arm.start is None else 1 + depth(arm.start)


def ancestor(arm: Arm, rank: int) -> Arm:
    """The arm of depth ``rank`` in the lineage of ``arm``."""
    while depth(arm) > rank:
        assert arm.start is not None
        arm = arm.start
    return arm


def seeded(arm: Arm, seed: int) -> Arm:
    """The same arm, and all that it starts from, with another seed."""
    return replace(arm, seed=seed, start=seeded(arm.start, seed) if arm.start else None)
