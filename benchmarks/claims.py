"""The paper's claims on the embedded teacher: one claim a command, three seeds, equal tokens, a table and JSON.

    python benchmarks/claims.py losses              (--seeds 0 1 2 --jobs 2 --folder runs/claims)
    python benchmarks/claims.py all --json docs/claims.json --doc docs/claims.md

What has been run already is read back from the folder. ``docs/claims.md`` shows all of it with a verdict; ``--doc``
puts the tables in their places there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arms import BLOCKS, Arm, Bench, run_all
from distill.importance.loo import block_as_identity
from distill.importance.loo import order as loo_order
from distill.records import read_json, write_json

STEPS = 50  # the base budget, of 8 rows of 128 tokens
LOSS = "annealed_kl"  # what did best in the first claim; its held-out figure is the reverse KL
Results = Mapping[Arm, dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """A claim: the arms by their labels, and what else its figures say (``extra(results, seeds)``)."""

    title: str
    variants: Callable[[int], dict[str, Arm]]
    """``variants(seed)``: label -> arm; a label stands for the same thing under every seed."""
    extra: Callable[[Results, list[int]], dict[str, Any]] | None = None


class Claims:
    """All claims; ``loo`` is the order of blocks by LOO, least important first."""

    def __init__(self, loo: list[int], base: Arm, results: Callable[[list[Arm]], Results]) -> None:
        self.loo, self.base, self.results = loo, base, results
        half = BLOCKS // 2
        self.half = replace(base, blocks=tuple(sorted(loo[:half])))

    def at(self, seed: int, h: int = BLOCKS // 2, **changes: Any) -> Arm:
        """The base arm at h blocks by LOO, with changes."""
        return replace(self.base, blocks=tuple(sorted(self.loo[:h])), seed=seed, **changes)

    def mmr_arms(self, seed: int, trainable: str) -> list[Arm]:
        """MMR of every block of the teacher: 100 steps each."""
        return [
            replace(self.base, blocks=(block,), seed=seed, steps=100, batch_size=4, trainable=trainable, generate=False)
            for block in range(BLOCKS)
        ]

    def mmr_order(self, seed: int, trainable: str = "all", when: str = "end") -> list[int]:
        """Blocks by MMR, least important first."""
        arms = self.mmr_arms(seed, trainable)
        found = self.results(arms)
        return sorted(range(BLOCKS), key=lambda block: found[arms[block]][when]["reverse_kl"])

    def table(self) -> dict[str, Claim]:
        """Every claim by its name."""
        at = self.at
        budgets = (self.base.steps, 3 * self.base.steps)
        return {
            "losses": Claim(
                "reverse against forward KL, JSD, and forward annealed to reverse, over three budgets",
                lambda seed: {
                    f"{loss}, {steps * 1024 // 1000}k": at(seed, loss=loss, steps=steps)
                    for steps in (50, 100, 300)
                    for loss in ("reverse_kl", "forward_kl", "jsd", "annealed_kl")
                },
            ),
            "init": Claim(
                "MIL against random initialisation",
                lambda seed: (
                    {
                        f"{init}, {loss}, {steps * 1024 // 1000}k": at(seed, init=init, loss=loss, steps=steps)
                        for loss, steps in ((LOSS, budgets[0]), (LOSS, budgets[1]), ("reverse_kl", 100))
                        for init in ("mil", "fresh")
                    }
                    | {
                        f"{init}, h = 8, {LOSS}, 153k": at(seed, 8, init=init, steps=budgets[1])
                        for init in ("mil", "fresh")
                    }
                ),
            ),
            "layout": Claim(
                "aligned against faithful layout under GQA",
                lambda seed: {
                    f"{layout}, {steps * 1024 // 1000}k": at(seed, mil_layout=layout, steps=steps)
                    for steps in budgets
                    for layout in ("aligned", "faithful")
                },
            ),
            "conv_z": Claim(
                "conv and z initialisation: identity against default",
                lambda seed: {
                    "default": at(seed),
                    "conv identity": at(seed, conv_init="identity"),
                    "z identity": at(seed, z_init="identity"),
                    "both identity": at(seed, conv_init="identity", z_init="identity"),
                },
            ),
            "staged": Claim("staged against one-shot at equal total tokens", self.staged),
            "placement": Claim("LOO against MMR against uniform against worst placement", self.placements),
            "mmr_steps": Claim("MMR's ranking at 0 and at 100 steps", self.mmr_variants("all"), self.mmr_ranks),
            "mmr_trainable": Claim(
                "trainable: mixer against all in MMR", self.mmr_variants("mixer"), self.mmr_trainable
            ),
            "rates": Claim(
                "separate learning rates for mixers and body",
                lambda seed: {
                    "1e-3 for both": at(seed),
                    "mixers 3e-3": at(seed, mixer_learning_rate=3e-3),
                    "mixers 1e-3, body 3e-4": at(seed, learning_rate=3e-4, mixer_learning_rate=1e-3),
                    "mixers 3e-3, body 3e-4": at(seed, learning_rate=3e-4, mixer_learning_rate=3e-3),
                },
            ),
            "depth": Claim(
                "accuracy against h, one-shot, blocks by LOO",
                lambda seed: {f"h = {h}": at(seed, h, steps=budgets[1]) for h in (5, 7, 8, 9)},
            ),
        }

    def staged(self, seed: int) -> dict[str, Arm]:
        """5 -> 7 and 5 -> 7 -> 8, against 7 and 8 at once."""
        total = 3 * self.base.steps

        def chain(counts: tuple[int, ...], each: int) -> Arm:
            arm = self.at(seed, counts[0], steps=each)
            for before, h in pairwise(counts):
                added = tuple(sorted(self.loo[before:h]))
                arm = replace(self.base, blocks=added, seed=seed, steps=each, start=arm)
            return arm

        return {
            "7 at once": self.at(seed, 7, steps=total),
            "5 -> 7": chain((5, 7), total // 2),
            "8 at once": self.at(seed, 8, steps=total),
            "5 -> 7 -> 8": chain((5, 7, 8), total // 3),
        }

    def placements(self, seed: int) -> dict[str, Arm]:
        """Half of the blocks, chosen four ways."""
        half = BLOCKS // 2
        chosen = {
            "LOO": self.loo[:half],
            "MMR": self.mmr_order(seed)[:half],
            "MMR, mixer only": self.mmr_order(seed, "mixer")[:half],
            "uniform": [2 * i + 1 for i in range(half)],
            "worst (by LOO)": self.loo[half:],
        }
        return {label: replace(self.base, blocks=tuple(sorted(b)), seed=seed) for label, b in chosen.items()}

    def mmr_variants(self, trainable: str) -> Callable[[int], dict[str, Arm]]:
        """One arm a block."""
        return lambda seed: {f"block {arm.blocks[0]}": arm for arm in self.mmr_arms(seed, trainable)}

    def spearman(self, first: list[int], second: list[int]) -> float:
        """Rank correlation of two orders of the same blocks."""
        ranks = pd.DataFrame(
            {"a": pd.Series({b: i for i, b in enumerate(first)}), "b": pd.Series({b: i for i, b in enumerate(second)})}
        )
        return round(float(ranks["a"].corr(ranks["b"])), 3)

    def mmr_ranks(self, results: Results, seeds: list[int]) -> dict[str, Any]:
        """How much the ranking changes over the 100 steps, from seed to seed, and against LOO."""
        end = {seed: self.mmr_order(seed) for seed in seeds}
        start = {seed: self.mmr_order(seed, when="start") for seed in seeds}
        return {
            "order_start": start,
            "order_end": end,
            "spearman_start_end": [self.spearman(start[s], end[s]) for s in seeds],
            "spearman_between_seeds": [self.spearman(end[a], end[b]) for a in seeds for b in seeds if a < b],
            "spearman_with_loo": [self.spearman(end[s], self.loo) for s in seeds],
        }

    def mmr_trainable(self, results: Results, seeds: list[int]) -> dict[str, Any]:
        """Rank correlation of the cheap variant with the faithful one, and what each costs."""
        both = {t: self.results([a for s in seeds for a in self.mmr_arms(s, t)]) for t in ("all", "mixer")}
        seconds = {t: sum(r["train_seconds"] for r in found.values()) for t, found in both.items()}
        return {
            "order_mixer": {s: self.mmr_order(s, "mixer") for s in seeds},
            "spearman_mixer_all": [self.spearman(self.mmr_order(s), self.mmr_order(s, "mixer")) for s in seeds],
            "train_seconds": seconds,
            "time_ratio": round(seconds["mixer"] / seconds["all"], 3),
        }


def rows_of(claim: Claim, results: Results, seeds: list[int]) -> list[dict[str, Any]]:
    """One row a variant: mean and standard deviation over the seeds."""
    rows = []
    for label in claim.variants(seeds[0]):
        found = [results[claim.variants(seed)[label]] for seed in seeds]
        row: dict[str, Any] = {"variant": label, "tokens": found[0]["tokens"]}
        figures = {
            "reverse KL before": [r["start"]["reverse_kl"] for r in found],
            "reverse KL": [r["end"]["reverse_kl"] for r in found],
            "forward KL": [r["end"]["forward_kl"] for r in found],
        }
        if all("accuracy" in r for r in found):
            figures["accuracy %"] = [100 * r["accuracy"] for r in found]
            families = found[0].get("families", {})
            row["families %"] = {name: round(100 * mean(r["families"][name] for r in found), 1) for name in families}
        for name, values in figures.items():
            row[name], row[f"{name} sd"] = mean(values), stdev(values) if len(values) > 1 else 0.0
        row["by seed"] = [round(v, 4) for v in figures.get("accuracy %", figures["reverse KL"])]
        row["seconds"] = round(sum(r["seconds"] for r in found), 1)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = [n for n in ("reverse KL before", "reverse KL", "forward KL", "accuracy %") if n in rows[0]]
    lines = [f"| variant | tokens | {' | '.join(names)} | s |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        digits = {name: 1 if name == "accuracy %" else 4 for name in names}
        cells = [f"{row[n]:.{digits[n]}f} ± {row[n + ' sd']:.{digits[n]}f}" for n in names]
        lines.append(f"| {row['variant']} | {row['tokens'] / 1e3:.0f}k | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def placed_in(document: str, name: str, text: str) -> str:
    """``document`` with ``text`` between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    head, found, rest = document.partition(f"<!-- {name} -->\n")
    _, closed, tail = rest.partition(f"<!-- /{name} -->")
    return f"{head}{found}\n{text}\n\n{closed}{tail}" if closed else document


def teacher_loo(folder: Path) -> list[int]:
    """The order of the teacher's blocks by LOO on all 600 questions (once a folder)."""
    record = folder / "loo.json"
    if not record.is_file():
        from eval.loglikelihood import prepare

        bench = Bench(folder)
        requests = prepare("embedded_choice", bench.tokenizer, bench.model)
        base = requests.evaluate(bench.model)
        rows = []
        for block in range(BLOCKS):
            with block_as_identity(bench.model, block):
                without = requests.evaluate(bench.model)
            rows.append({**without, "block": block, "score": base["accuracy"] - without["accuracy"]})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {"blocks": rows, "order": loo_order(rows)})
    return list(read_json(record)["order"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", nargs="+", help="names of claims, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--loss", default=LOSS, help="loss of the base arm")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the base arm, of 1,024 tokens each")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"))
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--doc", type=Path, help="file with places for the tables, which are replaced")
    args = parser.parse_args()
    claims = Claims(
        teacher_loo(args.folder),
        Arm((), loss=args.loss, steps=args.steps),
        lambda arms: run_all(arms, args.folder, args.jobs),
    )
    table = claims.table()
    names = list(table) if args.claim == ["all"] else args.claim
    for name in names:
        if name not in table:
            parser.error(f"no claim '{name}'; there are {', '.join(table)}, all")
    report = {"loo": claims.loo, "base": {"loss": args.loss, "steps": args.steps}, "seeds": args.seeds, "claims": {}}
    for name in names:
        claim = table[name]
        results = claims.results([arm for seed in args.seeds for arm in claim.variants(seed).values()])
        rows = rows_of(claim, results, args.seeds)
        found: dict[str, Any] = {"title": claim.title, "rows": rows}
        text = markdown(rows)
        if claim.extra is not None:
            found["extra"] = claim.extra(results, args.seeds)
            text += "\n\n" + "\n".join(f"- {key}: {value}" for key, value in found["extra"].items())
        print(f"\n### {name}: {claim.title}\n\n{text}", flush=True)
        if args.doc:
            args.doc.write_text(placed_in(args.doc.read_text(), name, text))
        report["claims"][name] = found
    if args.json:
        write_json(args.json, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
