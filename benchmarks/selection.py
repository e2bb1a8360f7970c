"""Which selector of blocks is worth its cost: equal distillation after each, on two teachers, tables and JSON.

    distill pretrain teacher_small                                 # the second teacher, of another family and size
    python benchmarks/selection.py select arms --jobs 2            # --teachers embedded small --seeds 0 1 2
    python benchmarks/selection.py tables --doc docs/importance.md

``select`` scores each teacher's blocks by every selector (MMR in all its forms, leave-one-out, aligned mixers, ...).
``arms`` distils, from the teacher and at once, the hybrid of every selector at every h and seed, and measures held-out
KL and generated answers; selectors that choose the same blocks share an arm. Both write to a ledger, one JSON line
each, and do not repeat what stands there. ``tables`` reads the ledger alone. Seconds are of processor time on one
thread, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arms import HELD_OUT_SEED, LENGTH, MIX, Arm, Bench
from benchmarks.claims import placed_in
from distill.config import LooConfig, MixerConfig, MmrConfig, RecallDropConfig, ScoreConfig, TrainConfig
from distill.data.traces import EmbeddedTraces
from distill.importance import Setup, needs, scorer
from distill.importance.combine import RANK, ordered
from distill.teacher import RememberingTeacher
from eval.loglikelihood import prepare_all

LEDGER = Path("docs/importance.jsonl")
LOSS = "annealed_kl"  # what did best at this size (docs/claims.md); its held-out figure is the reverse KL
RECALL = ("recall", "chase")
APRIEL_LOO = (
    47, 39, 24, 36, 31, 43, 32, 20, 38, 37, 30, 33, 22, 23, 40, 42, 44, 35, 41, 27, 21, 46, 45, 49, 25, 34, 29, 28, 19,
    26, 18, 17, 16, 13, 15, 14, 8, 9, 12, 6, 11, 5, 48, 7, 10, 3, 4, 1, 0,
)  # fmt: skip
"""Blocks of Apriel-Nemotron-15B-Thinker, least important first: ``layer_importance`` of ServiceNow/Fast-LLM's
make_hybrid_checkpoint_with_importance_15b_mil.py (block 2 is not in it). The first 25 are those of H1-25."""
APRIEL_RELEASED = {
    25: (*range(20, 26), 27, *range(30, 34), *range(35, 48), 49),
    27: (3, 5),
    30: (6, 7, 8),
}
"""The blocks that each released checkpoint adds to the one before."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A teacher, the families that it knows, and the h at which selectors are compared."""

    source: str
    families: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def mix(self) -> dict[str, float]:
        return {family: MIX[family] for family in self.families}


SUBJECTS = {
    "embedded": Subject("embedded", ("add", "mod", "chase", "recall", "sort"), (5, 6, 7)),
    "small": Subject("runs/teacher_small", ("add", "recall", "sort"), (3, 4, 5)),
}


@dataclass(frozen=True)
class Selector:
    """A score with its options; ``seeds``: whether another seed gives another order."""

    score: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: bool = False


SELECTORS = {
    "loo": Selector("loo"),
    "mmr, all": Selector("mmr", {"trainable": "all"}, seeds=True),
    "mmr, block": Selector("mmr", {"trainable": "block"}, seeds=True),
    "mmr, mixer": Selector("mmr", {"trainable": "mixer"}, seeds=True),
    "aligned": Selector("aligned", seeds=True),
    "greedy": Selector("greedy", seeds=True),
    "kl_restore": Selector("kl_restore", seeds=True),
    "recall_drop": Selector("recall_drop"),
    "loo + aligned": Selector("combine", {"of": ("loo", "aligned")}, seeds=True),
    "loo + mmr, mixer": Selector("combine", {"of": ("loo", "mmr, mixer")}, seeds=True),
    "uniform": Selector("uniform"),
    "random": Selector("random", seeds=True),
    "first": Selector("first"),
    "last": Selector("last"),
}


class Ledger:
    """A file of one JSON line a result; the key of a line is all of it but its figures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def add(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def order(self, teacher: str, name: str, seed: int) -> list[int] | None:
        """The order of a selector; under a seed that it was not run with, that of the first."""
        found = {row["seed"]: row["order"] for row in self.kind("selection", teacher) if row["selector"] == name}
        return found.get(seed, found[min(found)]) if found else None

    def combined(self, teacher: str, label: str, seed: int) -> Row | None:
        """The combination of selectors that the ledger has: what the score ``combine`` would give, none run again."""
        found = []
        for name in SELECTORS[label].options["of"]:
            runs = {row["seed"]: row for row in self.kind("selection", teacher) if row["selector"] == name}
            if not runs or (SELECTORS[name].seeds and seed not in runs):
                return None
            found.append(runs.get(seed, runs[min(runs)]))
        ranks = [{block: 1 + place for place, block in enumerate(row["order"])} for row in found]
        rows = [
            {"block": block, "score": mean(rank[block] for rank in ranks), f"{RANK}first": ranks[0][block]}
            for block in sorted(ranks[0])
        ]
        return {
            "kind": "selection", "teacher": teacher, "selector": label, "seed": seed, "order": ordered(rows),
            "scores": {str(row["block"]): row["score"] for row in rows},
            "seconds": round(sum(row["seconds"] for row in found), 1), "tokens": sum(row["tokens"] for row in found),
        }  # fmt: skip

    def kind(self, kind: str, teacher: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind and row["teacher"] == teacher]

    def arm(self, teacher: str, blocks: Sequence[int], seed: int) -> Row | None:
        """The distillation of a hybrid with these blocks replaced."""
        for row in self.kind("arm", teacher):
            if row["blocks"] == sorted(blocks) and row["seed"] == seed:
                return row
        return None


def bench_of(name: str, args: argparse.Namespace) -> Bench:
    """The teacher, its data and its questions."""
    subject = SUBJECTS[name]
    tasks = [f"embedded_{family}" for family in subject.families]
    return Bench(Path("runs/selection"), subject.source, subject.mix, tasks, args.questions, args.rows)


def select(bench: Bench, name: str, selector: Selector, seed: int, args: argparse.Namespace) -> Row:
    """The order of a selector, and what it cost: processor seconds, and training tokens."""
    subject, layers = SUBJECTS[name], bench.model.config.num_hidden_layers
    config = score_config(subject, selector, args)
    read = needs(config, selector.score)
    train = TrainConfig(batch_size=4, learning_rate=1e-3, warmup_steps=10, loss=LOSS)
    rows = EmbeddedTraces(bench.tokenizer, args.score_steps * train.batch_size, LENGTH, bench.mix, seed * 1000)
    heldout = EmbeddedTraces(bench.tokenizer, args.heldout // LENGTH, LENGTH, bench.mix, HELD_OUT_SEED, held_out=True)

    def tasks(names: Sequence[str], questions: int) -> Any:
        return prepare_all(names, bench.tokenizer, bench.model, questions).compare

    metric = tasks([f"embedded_choice_{family}" for family in subject.families], 500) if "metric" in read else None
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        setup = Setup(
            model=bench.model,
            teacher=RememberingTeacher(bench.model),
            blocks=list(range(layers)),
            metric=metric,
            rows=rows,
            heldout=heldout,
            config=config,
            train=train,
            mixer=MixerConfig(),
            seed=seed,
            kernels="auto",
            dtype="float32",
            scratch=Path(scratch),
            report=lambda block, row: None,
            added=min(subject.counts) if selector.score == "kl_restore" else max(subject.counts),
            tasks=tasks,
        )
        began = time.process_time()
        record = scorer(selector.score)(setup)
        seconds = time.process_time() - began
    assert selector.score != "combine", "of the ledger's own orders"
    trained = args.score_steps * train.batch_size * LENGTH if "rows" in read else 0
    return {
        "kind": "selection",
        "teacher": name,
        "selector": next(key for key, value in SELECTORS.items() if value is selector),
        "seed": seed,
        "order": record["order"],
        "scores": {str(row["block"]): round(row["score"], 6) for row in record["blocks"]},
        "seconds": round(seconds, 1),
        "tokens": trained * (layers if selector.score == "mmr" else 1),
    }


def score_config(subject: Subject, selector: Selector, args: argparse.Namespace) -> ScoreConfig:
    """The options of a selector."""
    tasks = {family: f"embedded_choice_{family}" for family in subject.families}
    config = ScoreConfig(
        loo=LooConfig(questions=500),
        mmr=MmrConfig(steps=args.score_steps, trainable=selector.options.get("trainable", "all")),
        recall_drop=RecallDropConfig(
            recall=[task for family, task in tasks.items() if family in RECALL],
            rest=[task for family, task in tasks.items() if family not in RECALL],
        ),
    )
    if hasattr(config, "aligned"):
        config.aligned = replace(config.aligned, steps=args.score_steps)
    return config


def distil(bench: Bench, name: str, blocks: tuple[int, ...], seed: int, args: argparse.Namespace) -> Row:
    """Distil the hybrid with ``blocks`` replaced from the teacher, and measure it."""
    arm = Arm(blocks, seed=seed, steps=args.steps, batch_size=8, loss=LOSS)
    began = time.process_time()
    _, found = bench.figures(arm)
    return {
        "kind": "arm",
        "teacher": name,
        "blocks": list(blocks),
        "seed": seed,
        "tokens": arm.tokens,
        "reverse_kl": round(found["end"]["reverse_kl"], 5),
        "forward_kl": round(found["end"]["forward_kl"], 5),
        "accuracy": round(found["accuracy"], 4),
        "families": {task: round(value, 3) for task, value in found["families"].items()},
        "seconds": round(time.process_time() - began, 1),
    }


_benches: dict[str, Bench] = {}


def work(job: tuple[Any, ...], args: argparse.Namespace) -> Row:
    """One selection or arm, in a worker process of one thread."""
    kind, name, *rest = job
    if name not in _benches:
        from stages.cli import quiet

        quiet()
        _benches.clear()  # one teacher's answers at a time
        _benches[name] = bench_of(name, args)
    bench = _benches[name]
    if kind == "teacher":
        return {"kind": "teacher", "teacher": name, **bench.answers(bench.model), "parameters": size_of(bench.model)}
    if kind == "selection":
        return select(bench, name, SELECTORS[rest[0]], rest[1], args)
    return distil(bench, name, rest[0], rest[1], args)


def size_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def selections(ledger: Ledger, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """Teachers and selections that are not in the ledger; those of the first seed before the others."""
    for name in args.teachers:
        if not ledger.kind("teacher", name):
            yield "teacher", name
    for seed in args.seeds:
        for name in args.teachers:
            for label in args.selectors:
                selector = SELECTORS[label]
                if selector.score == "combine" or not answers(selector, SUBJECTS[name]):
                    continue
                once = not selector.seeds or label in args.once
                done = {row["seed"] for row in ledger.kind("selection", name) if row["selector"] == label}
                if seed not in done and not (once and seed != args.seeds[0]):
                    yield "selection", name, label, seed


def answers(selector: Selector, subject: Subject) -> bool:
    """Whether a selector has what it asks: recall_drop needs families of both kinds."""
    return selector.score != "recall_drop" or len({family in RECALL for family in subject.families}) == 2


def combine(ledger: Ledger, args: argparse.Namespace) -> None:
    """Add the combinations of selectors that are in the ledger."""
    for name in args.teachers:
        done = {(row["selector"], row["seed"]) for row in ledger.kind("selection", name)}
        for label, selector in SELECTORS.items():
            for seed in args.seeds if selector.score == "combine" else ():
                if (label, seed) not in done and (row := ledger.combined(name, label, seed)) is not None:
                    ledger.add(row)


def arms(ledger: Ledger, args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Hybrids that selectors of the ledger choose and that are not distilled yet: seed by seed."""
    wanted: dict[tuple[Any, ...], None] = {}
    for name in args.teachers:
        for seed in args.seeds:
            for h in SUBJECTS[name].counts:
                for label in args.selectors:
                    order = ledger.order(name, label, seed)
                    if order is not None and ledger.arm(name, order[:h], seed) is None:
                        wanted["arm", name, tuple(sorted(order[:h])), seed] = None
    return list(wanted)


def run(jobs: Sequence[tuple[Any, ...]], ledger: Ledger, args: argparse.Namespace) -> None:
    """Do ``jobs`` in worker processes of one thread each; what is done goes to the ledger at once."""
    if not jobs:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[Row]] = [pool.submit(work, job, args) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            row = future.result()
            ledger.add(row)
            told = {key: value for key, value in row.items() if key not in ("scores", "families")}
            print(f"{number}/{len(jobs)}, {time.monotonic() - began:.0f} s: {json.dumps(told)}", flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard error over the seeds; of one alone its value."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def figures(ledger: Ledger, name: str, label: str, h: int, seeds: Sequence[int]) -> list[Row]:
    """The arms of a selector at h, of the seeds that have been run."""
    orders = {seed: ledger.order(name, label, seed) for seed in seeds}
    found = [ledger.arm(name, order[:h], seed) for seed, order in orders.items() if order is not None]
    return [row for row in found if row is not None]


def quality_table(ledger: Ledger, name: str, seeds: Sequence[int]) -> list[Row]:
    """A row a selector, best first: KL and accuracy at every h, its cost."""
    rows: list[Row] = []
    for label in SELECTORS:
        runs = [row for row in ledger.kind("selection", name) if row["selector"] == label]
        if not runs:
            continue
        row: Row = {"selector": label}
        means = []
        for h in SUBJECTS[name].counts:
            found = figures(ledger, name, label, h, seeds)
            if found:
                row[f"KL, h = {h}"] = spread([each["reverse_kl"] for each in found], 3)
                row[f"accuracy %, h = {h}"] = spread([100 * each["accuracy"] for each in found], 1)
                means.append((mean(each["accuracy"] for each in found), len(found)))
        if means:
            row["mean %"] = 100 * mean(value for value, _ in means)
            row["arms"] = sum(count for _, count in means)
        row["s"] = mean(each["seconds"] for each in runs)
        row["tokens"] = runs[0]["tokens"]
        row["orders"] = len(runs)
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("mean %", -1))


def hybrid_table(ledger: Ledger, name: str, seeds: Sequence[int]) -> list[Row]:
    """A row for every hybrid that a selector which looks at the model chose: who chose it, accuracy by family."""
    rows: list[Row] = []
    for h in SUBJECTS[name].counts:
        chosen: dict[tuple[int, ...], list[str]] = {}
        for label, order in orders_of(ledger, name, seeds[0]).items():
            if label not in ("uniform", "random", "first"):
                chosen.setdefault(tuple(sorted(order[:h])), []).append(label)
        for blocks, labels in chosen.items():
            found = [row for seed in seeds if (row := ledger.arm(name, blocks, seed)) is not None]
            if found:
                row: Row = {"h": h, "replaced": ", ".join(map(str, blocks)), "chosen by": "; ".join(labels)}
                for task in found[0]["families"]:
                    row[f"{task.removeprefix('embedded_')} %"] = 100 * mean(each["families"][task] for each in found)
                rows.append({**row, "seeds": len(found)})
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; a row lacks what was not run."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(key, row.get(key)) for key in keys) + " |" for row in rows])


def cell(key: str, value: Any) -> str:
    if key == "tokens":
        return f"{value / 1000:,.0f}k"
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def spearman(first: Sequence[int], second: Sequence[int]) -> float:
    """Rank correlation of two orders of the same blocks."""
    places = pd.DataFrame({which: {block: i for i, block in enumerate(order)} for which, order in
                           (("a", first), ("b", second))})  # fmt: skip
    return float(places["a"].corr(places["b"]))


def orders_of(ledger: Ledger, name: str, seed: int) -> dict[str, list[int]]:
    """Selector -> its order under a seed."""
    found = {label: ledger.order(name, label, seed) for label in SELECTORS}
    return {label: order for label, order in found.items() if order is not None}


def correlation_table(ledger: Ledger, name: str, seeds: Sequence[int]) -> list[Row]:
    """Rank correlations among selectors, means over the seeds; on the diagonal those of a selector's own orders under
    two seeds, where it has several."""
    by_seed = [orders_of(ledger, name, seed) for seed in seeds]
    rows = []
    for first in by_seed[0] if by_seed else ():
        row: Row = {"": first}
        for second in by_seed[0]:
            if first == second:
                own = [each["order"] for each in ledger.kind("selection", name) if each["selector"] == first]
                values = [spearman(a, b) for a, b in combinations(own, 2)]
            else:
                values = [spearman(orders[first], orders[second]) for orders in by_seed]
            row[second] = f"{mean(values):.2f}" if values else "·"
        rows.append(row)
    return rows


def order_table(ledger: Ledger, name: str, seed: int) -> list[Row]:
    """The blocks from the least to the most important, by every selector."""
    return [
        {"selector": label, f"order, seed {seed}": ", ".join(map(str, order))}
        for label, order in orders_of(ledger, name, seed).items()
    ]


def carried(ledger: Ledger, seeds: Sequence[int]) -> dict[str, Any]:
    """Whether the ranking of selectors on one teacher is that on the other: the rank correlation of their mean
    accuracies, over all selectors and without the baselines."""
    means: dict[str, dict[str, float]] = {}
    for name in SUBJECTS:
        rows = {row["selector"]: row["mean %"] for row in quality_table(ledger, name, seeds) if "mean %" in row}
        if rows:
            means[name] = rows
    if len(means) < 2:
        return {}
    frame = pd.DataFrame(means).dropna()
    scored = frame.drop(index=[label for label in ("uniform", "random", "first", "last") if label in frame.index])
    rank = lambda part: float(part.rank().corr().iloc[0, 1])  # noqa: E731
    return {
        "selectors": len(frame),
        "spearman": round(rank(frame), 2),
        "spearman_without_baselines": round(rank(scored), 2),
        "best": {name: max(rows, key=lambda label: rows[label]) for name, rows in means.items()},
    }


def apriel_table() -> list[Row]:
    """What MMR added to the released checkpoints, and what the released leave-one-out order would have."""
    rows, chosen = [], set(APRIEL_RELEASED[25])
    assert chosen == set(APRIEL_LOO[:25]), "the first stage is by LOO"
    for h in (27, 30):
        added = APRIEL_RELEASED[h]
        left = [block for block in APRIEL_LOO if block not in chosen]
        wanted = left[: len(added)]
        rows.append(
            {
                "stage": f"H1-{h}",
                "MMR added": ", ".join(map(str, added)),
                "LOO would have added": ", ".join(map(str, wanted)),
                "in common": len(set(added) & set(wanted)),
                "LOO's rank of MMR's, of those left": ", ".join(
                    f"{1 + left.index(block)}/{len(left)}" for block in added
                ),
            }
        )
        chosen |= set(added)
    return rows


def tables(ledger: Ledger, args: argparse.Namespace) -> dict[str, str]:
    """Every table by the name of its place in the document."""
    found = {"apriel": markdown(apriel_table())}
    for name in SUBJECTS:
        if ledger.kind("selection", name):
            found[f"{name}_quality"] = markdown(quality_table(ledger, name, args.seeds))
            found[f"{name}_hybrids"] = markdown(hybrid_table(ledger, name, args.seeds))
            found[f"{name}_orders"] = markdown(order_table(ledger, name, args.seeds[0]))
            found[f"{name}_ranks"] = markdown(correlation_table(ledger, name, args.seeds))
        for row in ledger.kind("teacher", name)[:1]:
            families = ", ".join(
                f"{task.removeprefix('embedded_')} {100 * value:.0f}%" for task, value in row["families"].items()
            )
            found[f"{name}_teacher"] = f"{row['parameters']:,} parameters; {families}"
    if both := carried(ledger, args.seeds):
        found["carried"] = "\n".join(f"- {key}: {value}" for key, value in both.items())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("select", "arms", "tables"))
    parser.add_argument("--teachers", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS), choices=list(SELECTORS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--once", nargs="*", default=[], metavar="NAME", help="selectors of one seed alone, for time")
    parser.add_argument("--steps", type=int, default=40, help="of an arm, of 1,024 tokens each")
    parser.add_argument("--score-steps", type=int, default=50, help="of a score that trains, of 512 tokens each")
    parser.add_argument("--heldout", type=int, default=16384, help="tokens on which such a score takes its losses")
    parser.add_argument("--questions", type=int, default=40, help="generated answers a family")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of 128 tokens, for the KL of an arm")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--doc", type=Path, help="file with places for the tables, which are replaced")
    args = parser.parse_args()
    ledger = Ledger(args.ledger)
    if "select" in args.what:
        run(list(selections(ledger, args)), ledger, args)
        combine(ledger, args)
    if "arms" in args.what:
        run(arms(ledger, args), ledger, args)
    found = tables(ledger, args)
    for name, text in found.items():
        print(f"\n### {name}\n\n{text}", flush=True)
        if args.doc:
            args.doc.write_text(placed_in(args.doc.read_text(), name, text))
    print(json.dumps({"ledger": str(args.ledger), "lines": len(ledger.rows), **carried(ledger, args.seeds)}))


if __name__ == "__main__":
    main()
