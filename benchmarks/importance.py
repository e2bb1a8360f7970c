"""What the cheap importance scores cost beside the faithful ones, and whether they say the same; at several depths L.

    make bench-importance                                       # some twenty minutes on 2 cores
    python benchmarks/importance.py --layers 8 --budget 0.3     # shorter

One process; float32 on CPU; kernels are compiled before anything is timed. The ways that are compared take turns; a
ratio is the median of those of neighbouring turns, for the machine may be slower in the next (a tenth from one to the
next is usual on a shared one: leave-one-out, which is short, takes the more turns).

*mmr*: MMR that trains the mixer alone, in lockstep, against L separate runs with the same trainable set, whose frozen
weights have no gradients either; each run asks the teacher by itself. Beside it the same with a teacher that remembers
what the run before asked (``remembering``, up to 16 blocks). *loo*: by shared prefixes against evaluating the model
without each block from its beginning. *aligned*: align all mixers and score by shared prefixes, against MMR that trains
everything, as in the paper; rank correlations of both orders.

So that ranks mean something the teachers are trained: one of 8 blocks from nothing on the embedded traces, the deeper
ones from it, every block doubled and trained on (``--teacher-seconds`` each); and the embedded teacher of 10 blocks
(key ``embedded``) for the rank correlation. With L blocks MMR takes ``steps[L]`` steps a candidate in place of 100, and
alignment and held-out tokens are cut by the same factor: each part of either time is proportional to them, so that
their ratio is kept. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.config import AlignedConfig, LooConfig, MixerConfig, MmrConfig, ScoreConfig, TrainConfig
from distill.data.pack import collate
from distill.data.traces import EmbeddedTraces
from distill.importance import Setup, scorer
from distill.importance.comparison import spearman
from distill.importance.lockstep import lockstep
from distill.importance.loo import block_as_identity
from distill.importance.mmr import order, separate
from distill.likelihood import Requests
from distill.teacher import RememberingTeacher, Teacher, load_model, load_tokenizer
from eval.loglikelihood import prepare

LENGTH, HELD_OUT_SEED = 128, 90_001
MIX = {"add": 1.0, "mod": 1.0, "chase": 1.0, "recall": 1.0, "sort": 1.0}
EMBEDDED = "embedded"
STEPS = {8: 12, 16: 5, 32: 2, 10: 24}
"""Of MMR, by depth (10: the embedded teacher), in place of 100."""
BOUNDS = {"mmr": {8: 0.55, 16: 0.50, 32: 0.46}, "loo": {8: 0.60, 16: 0.56, 32: 0.54}, "aligned": {16: 0.10}}
"""What is asked of each ratio."""
Timed = Callable[[], Any]


class Run(NamedTuple):
    """Seconds that a way took in each turn, for how many of them a core worked, and what it gave."""

    seconds: list[float]
    busy: list[float]
    value: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[8, 16, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens a step")
    parser.add_argument("--questions", type=int, default=40, help="of leave-one-out at 8 blocks")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the steps to take")
    parser.add_argument("--teacher-seconds", type=float, default=30.0, help="training of each teacher")
    parser.add_argument("--without-embedded", action="store_true", help="leave the embedded teacher out")
    parser.add_argument("--without-all", action="store_true", help="leave out MMR that trains everything, and aligned")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(EMBEDDED)
    results: dict[str, dict[str, Any]] = {}
    for layers, model in teachers(tokenizer, args):
        results[str(layers)] = measured(model, tokenizer, args, layers)
    if not args.without_embedded:
        steps, args.rows = max(int(STEPS[10] * args.budget), 1), args.rows
        found = aligned(setup_of(load_model(EMBEDDED), tokenizer, args, steps), args)
        results[EMBEDDED] = {"steps": steps, "aligned": found}
        tell(10, "aligned", found)
    print(json.dumps({**summary(results), "threads": args.threads, "seconds": time.perf_counter() - began}))


def measured(model: Any, tokenizer: Any, args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """All comparisons on one teacher."""
    steps = max(int(STEPS.get(layers, 320 // layers) * args.budget), 1)
    found: dict[str, Any] = {"steps": steps}
    found["loo"] = leave_one_out(model, tokenizer, args)
    tell(layers, "loo", found["loo"])
    setup = setup_of(model, tokenizer, args, steps)
    found["mmr"] = mixer_mmr(setup, args)
    tell(layers, "mmr", found["mmr"])
    if not args.without_all:
        found["aligned"] = aligned(setup, args)
        found["aligned"]["time_ratio_mixer"] = found["aligned"]["seconds"] / found["mmr"]["seconds"]
        found["aligned"]["spearman_mixer"] = spearman(found["aligned"]["order"], found["mmr"]["order"])
        tell(layers, "aligned", found["aligned"])
    return found


def leave_one_out(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """By shared prefixes, and block by block."""
    blocks = range(model.config.num_hidden_layers)
    questions = max(args.questions * 8 // len(blocks), 24)
    requests: Requests = prepare("embedded_choice", tokenizer, model, questions)

    def naive() -> list[tuple[float, float]]:
        base = requests.evaluate(model)["accuracy"]
        figures = [without(block) for block in blocks]
        return [(base - each["accuracy"], each["loglikelihood"]) for each in figures]

    def without(block: int) -> dict[str, float]:
        with block_as_identity(model, block):
            return requests.evaluate(model)

    setup = setup_of(model, tokenizer, args, 1, metric=requests.compare)

    def shared() -> list[tuple[float, float]]:
        return [(row["score"], row["loglikelihood"]) for row in scorer("loo")(setup)["blocks"]]

    ours, other = in_turns([shared, naive], args.rounds * max(48 // len(blocks), 2) - 1)
    return {**ratios(ours, other), "identical": ours.value == other.value}


def mixer_mmr(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """The mixer trained alone: in lockstep, and in separate runs, without and with a teacher that remembers."""
    setup = replace(setup, config=replace(setup.config, mmr=replace(setup.config.mmr, trainable="mixer")))
    model = setup.teacher.model
    warm_up(setup)

    def together() -> list[int]:
        return order(lockstep(replace(setup, teacher=Teacher(model))))

    def apart() -> list[int]:
        return order(separate(replace(setup, teacher=Teacher(model))))

    def remembering() -> list[int]:
        return order(separate(replace(setup, teacher=RememberingTeacher(model))))

    more = [remembering] if len(setup.blocks) <= 16 else []  # deeper, it would take minutes more
    ours, other, *third = in_turns([together, apart, *more], args.rounds)
    return {
        **ratios(ours, other),
        **{f"{key}_remembering": value for run in third for key, value in ratios(ours, run).items() if "ratio" in key},
        "spearman": spearman(ours.value, other.value),
        "order": other.value,
    }


def warm_up(setup: Setup) -> None:
    """One candidate for one step, so that no way has to compile the kernels that all take."""
    one = replace(setup, blocks=setup.blocks[:1], config=replace(setup.config, mmr=replace(setup.config.mmr, steps=1)))
    with contextlib.redirect_stdout(io.StringIO()):
        lockstep(one)


def aligned(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Aligned mixers, and MMR that trains everything."""

    def ours() -> dict[str, Any]:
        return scorer("aligned")(replace(setup, teacher=Teacher(setup.teacher.model)))

    def faithful() -> dict[str, Any]:
        return scorer("mmr")(replace(setup, teacher=RememberingTeacher(setup.teacher.model)))

    one, other = in_turns([ours, faithful], 1)
    first, second = one.value, other.value
    losses = [{int(row["block"]): round(row["score"], 4) for row in each["blocks"]} for each in (first, second)]
    return {
        **ratios(one, other),
        "spearman": spearman(first["order"], second["order"]),
        "order": first["order"],
        "mmr_order": second["order"],
        "scores": losses[0],
        "mmr_scores": losses[1],
    }


def setup_of(model: Any, tokenizer: Any, args: argparse.Namespace, steps: int, metric: Any = None) -> Setup:
    """The scores' input: ``steps`` of MMR in place of 100, and so many of all else."""
    heldout = max(16_384 * steps // 100 // LENGTH, args.rows)
    align = AlignedConfig()
    align = replace(align, steps=max(align.steps * steps // 100, 1), heldout_tokens=heldout * LENGTH)
    return Setup(
        model=model,
        teacher=Teacher(copy.deepcopy(model)),
        blocks=list(range(model.config.num_hidden_layers)),
        metric=metric,
        rows=EmbeddedTraces(tokenizer, 100 * args.rows, LENGTH, MIX, 0),
        heldout=EmbeddedTraces(tokenizer, heldout, LENGTH, MIX, HELD_OUT_SEED, held_out=True),
        config=ScoreConfig(loo=LooConfig(), mmr=MmrConfig(steps=steps, heldout_tokens=heldout * LENGTH), aligned=align),
        train=TrainConfig(batch_size=args.rows, learning_rate=1e-3),
        mixer=MixerConfig(),
        seed=0,
        kernels="auto",
        dtype="float32",
        scratch=Path(tempfile.mkdtemp()),
        report=lambda block, row: None,
    )


def in_turns(ways: Sequence[Timed], rounds: int) -> list[Run]:
    """Each way's times and what it gave first, the ways in turn, there and back."""
    found: dict[int, Run] = {}
    for turn in range(rounds):
        for number in range(len(ways))[:: -1 if turn % 2 else 1]:
            set_seed(0)
            with contextlib.redirect_stdout(io.StringIO()):
                began, busy = time.perf_counter(), time.process_time()
                value = ways[number]()
                run = found.setdefault(number, Run([], [], value))
                run.seconds.append(time.perf_counter() - began)
                run.busy.append(time.process_time() - busy)
    return [found[number] for number in range(len(ways))]


def ratios(ours: Run, other: Run) -> dict[str, float]:
    """Times of both, and their ratio: of seconds, and of what the cores worked, which other work hardly changes."""
    return {
        "seconds": min(ours.seconds),
        "other_seconds": min(other.seconds),
        "busy": min(ours.busy),
        "other_busy": min(other.busy),
        "time_ratio": median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True)),
        "busy_ratio": median(a / b for a, b in zip(ours.busy, other.busy, strict=True)),
    }


def teachers(tokenizer: Any, args: argparse.Namespace) -> Any:
    """(L, a trained teacher of L blocks), the shallow ones first: each from the one before, its blocks doubled, where
    that fits, or else from nothing."""
    shape = {"hidden_size": args.width, "intermediate_size": 2 * args.width, "num_attention_heads": 4}
    small = {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 4096}
    model: Any = None
    for layers in sorted(args.layers):
        before = model
        set_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **shape, **small)
        model = LlamaForCausalLM(config)
        if before is not None and layers % before.config.num_hidden_layers == 0:
            repeat = layers // before.config.num_hidden_layers
            state: dict[str, Any] = {}
            for name, tensor in before.state_dict().items():
                if not name.startswith("model.layers."):
                    state[name] = tensor
                    continue
                block, rest = name.removeprefix("model.layers.").split(".", 1)
                for place in range(int(block) * repeat, (int(block) + 1) * repeat):
                    state[f"model.layers.{place}.{rest}"] = tensor / (repeat if is_output(rest) else 1)
            model.load_state_dict(state)
        loss, steps = train(model, tokenizer, args)
        print(f"teacher of {layers} blocks: {steps} steps, loss {loss:.3f}", flush=True)
        yield layers, model.eval()


def is_output(name: str) -> bool:
    """Whether a weight adds to the residual stream: two copies of a block then add what one did."""
    return name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def train(model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> tuple[float, int]:
    """Train on the embedded traces for so many seconds; the mean loss of the last ten steps, and how many they were."""
    rows = EmbeddedTraces(tokenizer, 1 << 20, LENGTH, {"add": 1.0, "mod": 1.0, "sort": 1.0}, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < args.teacher_seconds or len(losses) < 10:
        batch = collate([rows[len(losses) * 16 + i] for i in range(16)])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(min(1.0, len(losses) / 20, 2 - 2 * spent / args.teacher_seconds), 0.02)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10, len(losses)


def tell(layers: int, what: str, found: Mapping[str, Any]) -> None:
    """One line."""
    figures = "  ".join(f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, (int, float)))
    bound = BOUNDS[what].get(layers)
    asked = "" if bound is None else f"  (at most {bound} asked)"
    print(f"L {layers:2d}  {what:8s}{figures}{asked}", flush=True)


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The last line: each figure by L."""

    def by_depth(what: str, key: str) -> dict[str, Any]:
        return {depth: found[what][key] for depth, found in results.items() if key in found.get(what, {})}

    return {
        "mmr_time_ratio": by_depth("mmr", "time_ratio"),
        "mmr_time_ratio_remembering": by_depth("mmr", "time_ratio_remembering"),
        "mmr_spearman": by_depth("mmr", "spearman"),
        "mmr_busy_ratio": by_depth("mmr", "busy_ratio"),
        "loo_time_ratio": by_depth("loo", "time_ratio"),
        "loo_busy_ratio": by_depth("loo", "busy_ratio"),
        "loo_identical": by_depth("loo", "identical"),
        "aligned_time_ratio": by_depth("aligned", "time_ratio"),
        "aligned_busy_ratio": by_depth("aligned", "busy_ratio"),
        "aligned_spearman": by_depth("aligned", "spearman"),
        "results": results,
    }


if __name__ == "__main__":
    main()
