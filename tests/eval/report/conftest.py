"""Synthetic run folders for the report's tests, as the steps write them: finished, unfinished, tuned, served."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

BLOCKS = 10
TASKS = {"add": "generative", "recall": "generative", "chase": "generative", "embedded_choice": "multiple_choice"}
STAGES = {5: ([1, 3, 4, 6, 8], 0.965, 1.43), 7: ([2, 7], 0.86, 1.71)}


def write_json(file: Path, record: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def measure(name: str, replaced: int, tokens: int, level: float, ratio: float) -> dict[str, Any]:
    """A plausible measure.json: a model at `level` accuracy and `ratio` times the teacher's speed."""
    accuracy = [
        {
            "task": task,
            "kind": kind,
            "metric": "exact_match" if kind == "generative" else "acc",
            "value": level - 0.01 * i,
            "stderr": math.sqrt(0.03 / (100 if kind == "generative" else 600)),
            "n": 100 if kind == "generative" else 600,
        }
        for i, (task, kind) in enumerate(TASKS.items())
    ]
    throughput = []
    for batch in (1, 32):
        for context in (64, 128, 256, 512, 1024, 2048):
            teacher = (1.9e-3 + 4e-8 * context * batch) * (1 + batch / 40)
            mine = teacher * (1 - 0.06 * replaced * min(1, context * batch / 4000))
            timed = {"teacher": (teacher, BLOCKS), name: (mine, BLOCKS - replaced)}
            for model, (seconds, left) in timed.items():
                row = {"model": model, "batch": batch, "context": context, "step_seconds": seconds}
                row |= {"step_seconds_low": 0.96 * seconds, "step_seconds_high": 1.07 * seconds}
                held = {"kv_bytes": batch * left * context * 512, "state_bytes": batch * (BLOCKS - left) * 9000}
                row |= {"tokens_per_second": batch / seconds, "cache_bytes": sum(held.values())}
                throughput.append(row | held)
    by_distance = [
        {"task": task, "distance": distance, "value": level ** (1 + distance), "stderr": 0.01, "n": 40 - 8 * distance}
        for task, distances in {"recall": range(5), "chase": range(1, 4)}.items()
        for distance in distances
    ]
    speed = 8123.0
    return {
        "name": name,
        "replaced": replaced,
        "num_blocks": BLOCKS,
        "tokens": tokens,
        "minutes": 2.31,
        "parameters": 2_100_000 + 20_000 * replaced,
        "accuracy": accuracy,
        "by_distance": by_distance,
        "throughput": throughput,
        "headline": {
            "batch": 32,
            "output_tokens": 1024,
            "teacher_tokens_per_second": speed,
            "tokens_per_second": speed * ratio,
            "ratio": ratio,
        },
    }


def serving(name: str, replaced: int, ratio: float) -> dict[str, Any]:
    """What `eval.serving` adds to a measure: both protocols, prefill, memory by length, whose roofline it is."""
    models = {"teacher": (0, 1.0), name: (replaced, ratio)}
    rows = []
    for model, (h, times) in models.items():
        speed = {"output_tokens": 16384, "roofline_fraction": 0.71, "roofline_ratio": 1.1 * times, "how": "sampled"}
        for batch in (1, 32):
            rate = 8123.0 / 32 * batch * times
            rates = {"tokens_per_second": rate, "tokens_per_second_low": 0.97 * rate, "tokens_per_second_high": rate}
            rows.append({"model": model, "protocol": "equal_batch", "batch": batch, "ratio": times, **rates, **speed})
        batch = 32 * BLOCKS // (BLOCKS - h)
        rate = {"tokens_per_second": 250.0 * batch * times, "ratio": times * batch / 32, "memory_bytes": 2**30}
        rows.append({"model": model, "protocol": "equal_memory", "batch": batch, **rate, **speed})
    prefill = [
        {"model": model, "batch": 8, "tokens": tokens, "seconds": 1e-4 * tokens / times, "roofline_fraction": 0.6}
        | {"seconds_low": 0.9e-4 * tokens / times, "seconds_high": 1.2e-4 * tokens / times}
        for model, (_, times) in models.items()
        for tokens in (512, 2048)
    ]
    memory = [
        {"model": model, "batch": 1, "tokens": tokens, "weight_bytes": 2**23, "kv_bytes": (BLOCKS - h) * tokens * 512}
        | {"state_bytes": 9000 * h, "overhead_bytes": 2**18, "measured": tokens <= 16384}
        for model, (h, _) in models.items()
        for tokens in (4096, 16384, 65536, 131072)
    ]
    parts = ("weight_bytes", "kv_bytes", "state_bytes", "overhead_bytes")
    return {
        "machine": {"name": "a CPU", "copy_bytes_per_second": 2.1e10, "product_flops_per_second": 1.5e11},
        "one_in_n_out": rows,
        "prefill": prefill,
        "memory": [{**row, "total_bytes": sum(row[part] for part in parts)} for row in memory],
        "pays_from": {"mamba1": {"1": 1200, "32": None}},
    }


def sealed(step: str, seconds: float, teacher: str = "cec4852e5c1361a1") -> dict[str, Any]:
    """A step.json."""
    provenance = {"host": "vm", "device": "a CPU, 2 cores", "command": "distill run demo", "python": "3.11.7"}
    provenance |= {"packages": {"torch": "2.13.0+cpu"}, "finished": "2026-11-21T09:01:06+0000"}
    inputs = {"teacher": teacher, "measure": {"limit": 0}}
    return {"step": step, "fingerprint": "0123456789abcdef", "inputs": inputs, "seconds": seconds} | {
        "provenance": provenance
    }


class Runs:
    """Builds and changes run folders."""

    stages, tasks = STAGES, TASKS

    def build(self, path: Path, stages: dict[int, Any] | None = None, steps: int = 200, *, name: str = "demo") -> Path:
        """A synthetic run folder of a 10-block teacher with schedule 5, 7, of which `stages` are done."""
        rng = random.Random(7)
        path.mkdir(parents=True)
        train = {"loss": "reverse_kl", "temperature": 1.0, "steps": steps}
        config = {"name": name, "teacher": "embedded", "schedule": [5, 7], "mixer": {"name": "mamba1"}, "train": train}
        (path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        write_json(path / "teacher" / "measure.json", measure("teacher", 0, 0, 0.985, 1.0))
        write_json(path / "teacher" / "step.json", sealed("teacher", 14.7))
        mixers = ["attention"] * BLOCKS
        for index, (replaced, (added, level, ratio)) in enumerate((STAGES if stages is None else stages).items(), 1):
            stage, named = path / "stages" / f"{index:02d}-H1-{replaced}", f"H1-{replaced}/{BLOCKS}"
            left = [block for block, mixer in enumerate(mixers) if mixer == "attention"]
            if index == 1:
                cost = {b: 0.003 * rng.random() + (0.02 if b not in added else 0) * (b + 1) for b in left}
                blocks = [{"block": b, "score": cost[b] + 0.3 * (b == 0), "stderr": 0.006} for b in left]
                scores = {"scorer": "loo", "metric": "acc", "baseline": 0.97, "baseline_stderr": 0.007}
                scores["blocks"] = blocks
            else:
                blocks = [
                    {"block": b, "score": end, "loss_start": rng.uniform(0.08, 0.16), "loss_end": end}
                    for b in left
                    for end in [0.021 + 0.001 * rng.random() + (0 if b in added else 0.012)]
                ]
                scores = {"scorer": "mmr", "steps": 25, "trainable": "all", "blocks": blocks}
            write_json(stage / "score" / "scores.json", scores | {"seconds": 12.5})
            for block in added:
                mixers[block] = "mamba1"
            write_json(stage / "place" / "placement.json", {"mixers": mixers, "added": added, "name": named})
            losses = [0.02 + 0.3 * index * math.exp(-step / 40) * rng.uniform(0.7, 1.3) for step in range(1, steps + 1)]
            log: list[dict[str, Any]] = []
            for step, loss in enumerate(losses, start=1):
                log.append({"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 4096 * step})
                if step % 50 == 0:
                    log.append({"step": step, "eval_loss": 0.02 + 0.3 * index * math.exp(-step / 40)})
            (stage / "train").mkdir(parents=True)
            (stage / "train" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            train = {"steps": steps, "tokens": 4096 * steps, "minutes": 2.31, "eval_loss_start": 0.35 * index}
            write_json(stage / "train" / "train.json", train)
            record = measure(named, replaced, 4096 * steps * index, level, ratio)
            write_json(stage / "measure" / "measure.json", record)
            for number, step in enumerate(("score", "place", "swap", "train", "measure"), 1):
                write_json(stage / step / "step.json", sealed(f"{stage.name}/{step}", 7.0 * number))
        return path

    def tune(
        self,
        run: Path,
        index: int,
        level: float,
        ratio: float,
        *,
        steps: tuple[str, ...] = ("train", "merge", "measure"),
    ) -> Path:
        """Adds what ``distill sft`` writes for a stage of `run`, up to the last of `steps`."""
        stage = sorted((run / "stages").iterdir())[index - 1]
        replaced, folder = int(stage.name.split("-")[-1]), run / "posttrain" / f"{stage.name}-SFT"
        before = json.loads((stage / "measure" / "measure.json").read_text())["tokens"]
        log = [{"step": step, "loss": 0.4 - step / 1000, "tokens": 2048 * step} for step in range(1, 101)]
        log += [{"step": 0, "eval_loss": 0.41}, {"step": 100, "eval_loss": 0.31}]
        train = "train" if "train" in steps else "train.partial"
        (folder / train).mkdir(parents=True)
        (folder / train / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        record = measure(f"H1-{replaced}/{BLOCKS}-SFT", replaced, before + 204_800, level, ratio) | {"minutes": 0.75}
        records = {
            "train": {"steps": 100, "tokens": 204_800, "minutes": 0.75, "eval_loss_start": 0.41, "eval_loss_end": 0.31},
            "merge": {"alpha": 0.25, "eval_loss": 0.345},
            "measure": record,
        }
        for step in steps:
            write_json(folder / step / f"{step}.json", records[step])
        return run

    def serve(self, run: Path) -> Path:
        """Adds to every measure of `run` what newer ones have: `serving`, rooflines, truncated generations."""
        for file in run.rglob("measure.json"):
            record = json.loads(file.read_text())
            record["serving"] = serving(record["name"], record["replaced"], record["headline"]["ratio"])
            record["throughput"] = [{**row, "roofline_fraction": 0.72} for row in record["throughput"]]
            record["accuracy"][0] |= {"truncated": 3, "empty": 1, "samples": 4}
            file.write_text(json.dumps(record))
        return run

    def edit(self, file: Path, **changes: Any) -> None:
        """Sets keys of a record."""
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def with_tasks(self, run: Path, tasks: dict[str, str], stderr: float = 0.0) -> Path:
        """The run with other tasks, each at 100%: the widest value."""
        told = {"metric": "acc", "value": 1.0, "stderr": stderr, "n": 9}
        for file in run.rglob("measure.json"):
            self.edit(file, accuracy=[{"task": task, "kind": kind, **told} for task, kind in tasks.items()])
        return run

    def page(self, run: Path) -> str:
        """The page of a run's report."""
        return (run / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="session")
def full(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    return runs.build(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="session")
def partial(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second stage was killed in training, in the middle of a log line."""
    run = runs.build(tmp_path_factory.mktemp("partial") / "run")
    stage = run / "stages" / "02-H1-7"
    shutil.rmtree(stage / "measure")
    for name in ("train.json", "step.json"):
        (stage / "train" / name).unlink()
    (stage / "train").rename(stage / "train.partial")
    log = stage / "train.partial" / "log.jsonl"
    log.write_text(log.read_text()[:5000])
    return run


@pytest.fixture(scope="session")
def served(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose measures have all that newer ones have; not to be changed."""
    return runs.serve(runs.tune(runs.build(tmp_path_factory.mktemp("served") / "run"), 1, 0.98, 1.42))
