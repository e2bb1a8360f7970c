"""The report of a run: frontier, table, figures, page; finished, unfinished and hostile run folders."""

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
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
            for model, seconds, left in (("teacher", teacher, BLOCKS), (name, mine, BLOCKS - replaced)):
                if name != "teacher" or model == "teacher" and left:
                    throughput.append(
                        {
                            "model": model,
                            "batch": batch,
                            "context": context,
                            "step_seconds": seconds,
                            "step_seconds_low": 0.96 * seconds,
                            "step_seconds_high": 1.07 * seconds,
                            "tokens_per_second": batch / seconds,
                            "cache_bytes": batch * (left * context * 512 + (BLOCKS - left) * 9000),
                        }
                    )
    speed = 8123.0
    return {
        "name": name,
        "replaced": replaced,
        "num_blocks": BLOCKS,
        "tokens": tokens,
        "minutes": 2.31,
        "parameters": 2_100_000 + 20_000 * replaced,
        "accuracy": accuracy,
        "throughput": throughput,
        "headline": {
            "batch": 32,
            "output_tokens": 1024,
            "teacher_tokens_per_second": speed,
            "tokens_per_second": speed * ratio,
            "ratio": ratio,
        },
    }


def build_run(path: Path, stages: dict[int, Any] | None = None, steps: int = 200) -> Path:
    """A synthetic run folder of a 10-block teacher with schedule 5, 7, of which `stages` are done."""
    rng = random.Random(7)
    path.mkdir(parents=True)
    distill = {"loss": "reverse_kl", "temperature": 1.0, "steps": steps}
    config = {"name": "demo", "teacher": "embedded", "schedule": [5, 7], "mixer": "mamba1", "distill": distill}
    (path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(path / "teacher" / "measure.json", measure("teacher", 0, 0, 0.985, 1.0))
    mixers = ["attention"] * BLOCKS
    for index, (replaced, (added, level, ratio)) in enumerate((STAGES if stages is None else stages).items(), 1):
        stage, name = path / "stages" / f"{index:02d}-H1-{replaced}", f"H1-{replaced}/{BLOCKS}"
        left = [block for block, mixer in enumerate(mixers) if mixer == "attention"]
        if index == 1:
            cost = {block: 0.003 * rng.random() + (0.02 if block not in added else 0) * (block + 1) for block in left}
            blocks = [{"block": b, "score": cost[b] + 0.3 * (b == 0), "stderr": 0.006} for b in left]
            scores = {"scorer": "loo", "metric": "acc", "baseline": 0.97, "baseline_stderr": 0.007, "blocks": blocks}
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
        write_json(stage / "place" / "placement.json", {"mixers": mixers, "added": added, "name": name})
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
        record = measure(name, replaced, 4096 * steps * index, level, ratio)
        write_json(stage / "measure" / "measure.json", record)
    return path
