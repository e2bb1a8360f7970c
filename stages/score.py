"""Score the importance of every block that still has attention.

    distill score demo            (or: distill score runs/demo --stage H1-7)

CONFIG or RUN. A stage that starts from the teacher uses LOO (accuracy lost when a block is the identity), later ones
MMR (loss after a short distillation with the block swapped), as in Apriel-H1, section 3.1. Writes
``score/scores.json``.

    distill score runs/demo --stage H1-7 --candidate 3

RUN. Scores one candidate alone (3: the fourth of the blocks that still have attention) beside other processes that
score others, as the tasks of a job array do. What they have scored is joined by ``distill score`` as above, which does
itself what is missing: the same scores, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import lock
from distill.errors import UserError
from distill.importance import Setup, apart, join, mixer_store, scorer
from distill.mixers import set_kernels
from distill.placement import ATTENTION
from distill.records import Step, read_record, verify, write_json
from distill.schedule import TEACHER, Stage
from distill.teacher import RememberingTeacher, load_model, load_tokenizer
from eval.loglikelihood import prepare
from stages.common import HELD_OUT_SEED, begin, find_stage, open_run, say, stage_main
from stages.context import SCORING, Context, rows_to_align
from stages.targets import check_device

SHARED = ("baseline", "baseline_stderr", "questions", "heldout_tokens")
"""What every candidate's process measures anew, and finds equal where machines are."""


def main(args: argparse.Namespace) -> int:
    if args.candidate is None:
        return stage_main(args, "score", run_stage)
    return score_candidate(args)


def run_stage(context: Context, stage: Stage) -> bool:
    """Score the blocks for one stage; returns whether there was anything to do."""
    context.before(stage)  # it must be there
    step = context.step(stage, "score")
    for path in sorted(place(step.partial).glob("*.lock")):
        lock.check(path, f"candidate {int(path.stem)} of {step.name}")
    return step.perform(lambda folder: score(context, stage, folder), resumable=True, scratch=("candidates", "scratch"))


def score(context: Context, stage: Stage, folder: Path) -> None:
    """Score what no candidate's process has, and join."""
    blocks = candidates(context, stage)
    found = scored(context.step(stage, "score"))
    records = [found[block] for block in blocks if block in found]
    if found:
        say(f"{stage.name}: {len(records)} of {len(blocks)} candidates are scored already")
    if left := [block for block in blocks if block not in found]:
        records.append(scorer(stage.scorer)(prepared(context, stage, left, folder / "scratch")))
    for key in SHARED:
        if len(values := {record[key] for record in records if key in record}) > 1:
            say(f"warning: {key} is not the same for every candidate ({min(values)} to {max(values)}): unlike machines")
    result = join(stage.scorer, records) if apart(stage.scorer) else records[0]
    write_json(folder / "scores.json", result)
    say(f"  least important first: {result['order']}")


def score_candidate(args: argparse.Namespace) -> int:
    """Score the i-th remaining block alone; the run folder is not locked, this candidate is."""
    if args.force:
        raise UserError("--force redoes a whole score: give it without --candidate")
    if args.stage is None:
        raise UserError("--candidate needs --stage: which of the stages it is a candidate of")
    if not (Path(args.target).expanduser() / "run.yaml").is_file():
        raise UserError(f"{args.target} is no run folder: --candidate works on a RUN that another verb has begun")
    context = open_run(args.target, args.overrides, write=False)
    check_device(context.config)
    stage = find_stage(context, args.stage, "score")
    assert stage is not None
    step = context.step(stage, "score")
    blocks = candidates(context, stage)
    if not 0 <= args.candidate < len(blocks):
        raise UserError(
            f"{stage.name}: no candidate {args.candidate}; expected a value in [0, {len(blocks)}), one for each block "
            "that still has attention"
        )
    block = blocks[args.candidate]
    step.check()
    if step.done or block in scored(step):
        say(f"{stage.name}: block {block} is scored already")
        return 0
    lock.check(context.run_dir / "run.lock", str(context.run_dir))
    folder = place(step.part())
    folder.mkdir(exist_ok=True)
    lock.hold(folder / f"{args.candidate:03d}.lock", f"candidate {args.candidate} of {step.name}")
    for path in step.reads:
        verify(path)
    record = scorer(stage.scorer)(prepared(context, stage, [block], step.partial / "scratch"))
    write_json(folder / f"{args.candidate:03d}.json", {"fingerprint": step.fingerprint, "record": record})
    return 0


def candidates(context: Context, stage: Stage) -> list[int]:
    """The blocks that still have attention, ascending."""
    _, mixers = context.before(stage)
    return [block for block, mixer in enumerate(mixers) if mixer == ATTENTION]


def place(partial: Path) -> Path:
    """Where the processes of single candidates write."""
    return partial / "candidates"


def scored(step: Step) -> dict[int, dict[str, Any]]:
    """By block, the records of single candidates with the inputs of ``step``."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(place(step.partial).glob("[0-9]*.json")):
        part = read_record(path, fingerprint=str, record=dict)
        if part["fingerprint"] == step.fingerprint:
            found[part["record"]["blocks"][0]["block"]] = part["record"]
    return found


def prepared(context: Context, stage: Stage, blocks: Sequence[int], scratch: Path) -> Setup:
    """All that scoring ``blocks`` takes, the models loaded."""
    config = context.config
    seed = begin(context, stage, SCORING)
    tokenizer = load_tokenizer(config.teacher)
    teacher = RememberingTeacher(load_model(config.teacher, config.dtype))  # every candidate sees the same rows
    dtype = config.dtype
    if stage.scorer == "mmr" or (stage.scorer != "loo" and stage.start.name != TEACHER):
        dtype = "float32"  # what is trained, or was, has float32 weights
    start, _ = context.before(stage)
    model = load_model(start, dtype)
    set_kernels(model, config.kernels)
    options = config.score
    say(f"{stage.name}: scoring {len(blocks)} blocks with {stage.scorer}")
    metric: Any = None
    rows: Any = None
    heldout: Any = None
    if stage.scorer != "loo":
        length, aligns = config.data.sequence_length, stage.scorer != "mmr"
        tokens = options.aligned.heldout_tokens if aligns else options.mmr.heldout_tokens
        count = rows_to_align(config) if aligns else options.mmr.steps * config.train.batch_size
        rows = context.rows(tokenizer, count, seed)
        heldout = context.rows(tokenizer, -(-tokens // length), HELD_OUT_SEED, held_out=True)
    else:
        metric = prepare(
            options.loo.task,
            tokenizer,
            model,
            options.loo.questions,
            few_shot=None if options.loo.few_shot < 0 else options.loo.few_shot,
            local_data=config.measure.local_data,
        ).compare

    def report(block: int, row: dict[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key not in ("block", "score"))
        say(f"  block {block:3d}  score {row['score']:.4f}  ({figures})")

    return Setup(
        model=model,
        teacher=teacher,
        blocks=blocks,
        metric=metric,
        rows=rows,
        heldout=heldout,
        config=options,
        train=config.train,
        mixer=config.mixer,
        seed=config.seed,
        kernels=config.kernels,
        dtype=config.dtype,
        scratch=scratch,
        report=report,
        added=stage.added,
        kept=scratch.parent / mixer_store.FOLDER,
        fingerprint=context.step(stage, "score").fingerprint,
    )
