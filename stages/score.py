"""Score the importance of every block that still has attention.

    distill score demo            (or: distill score runs/demo --stage H1-7)
    distill score my.yaml score.blocks=[3,7,9] "score.compare=[loo,mmr trainable=mixer]"

CONFIG or RUN. A stage that starts from the teacher uses LOO (accuracy lost when a block is the identity), later ones
MMR (loss after a short distillation with the block swapped), as in Apriel-H1, section 3.1. Writes
``score/scores.json`` and ``score/importance.parquet`` (a row for every score and block). Cut short, it goes on with the
blocks that are left. Started by torchrun, the processes share the candidates out.

    distill score runs/demo --stage H1-7 --candidate 3

RUN. Scores one candidate alone (3: the fourth of the blocks that are scored) beside other processes that score others,
as the tasks of a job array do. What they have scored is joined by ``distill score`` as above, which does itself what is
missing: the same scores, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from distill import distributed, lock
from distill.errors import UserError
from distill.importance import Setup, join, mixer_store, needs, parts, scorer
from distill.importance.checks import check_enough, check_finite, check_rows
from distill.importance.comparison import Entry, compared, entries
from distill.mixers import set_kernels
from distill.progress import Countdown
from distill.records import fingerprint, verify, write_json
from distill.schedule import TEACHER, Stage
from distill.teacher import RememberingTeacher, load_model, load_tokenizer
from eval.loglikelihood import prepare, prepare_all
from stages.candidates import Known, candidates, chosen, known
from stages.common import HELD_OUT_SEED, begin, find_stage, open_run, say, stage_main
from stages.context import SCORING, Context, mixers_of, rows_to_align
from stages.ranks import share
from stages.targets import check_device

SHARED = ("baseline", "baseline_stderr", "questions", "heldout_tokens")
"""What every candidate's process measures anew, and finds equal where machines are."""
FEW = 500
"""Questions below which accuracies are too coarse to rank blocks by."""


def main(args: argparse.Namespace) -> int:
    if args.candidate is None:
        return stage_main(args, "score", run_stage)
    return score_candidate(args)


def run_stage(context: Context, stage: Stage) -> bool:
    """Score the blocks for one stage; returns whether there was anything to do."""
    context.before(stage)  # it must be there
    step = context.step(stage, "score")
    for path in sorted(known(step).folder.glob("*.lock")):
        lock.check(path, f"candidate {int(path.stem)} of {step.name}")
    return step.perform(lambda folder: score(context, stage, folder), resumable=True, scratch=("candidates", "scratch"))


def score(context: Context, stage: Stage, folder: Path) -> None:
    """Take the score that decides, and those that are compared with it."""
    blocks = candidates(context, stage)
    check_enough(f"{stage.name}: {stage.scorer}", blocks, stage.added)
    share(context, stage, "score")
    every = entries(context.config.score, stage.scorer)
    mine = [part(context, stage, entry, number) for number, entry in enumerate(every)]
    if (job := distributed.job()) is not None:
        job.wait_for_others()
    records = [
        whole(context, stage, entry, number, record)
        for number, (entry, record) in enumerate(zip(every, mine, strict=True))
    ]
    check_rows(every[0].name, records[0]["blocks"], stage.added)
    others = {}
    for entry, record in zip(every[1:], records[1:], strict=True):
        try:
            check_rows(entry.name, record["blocks"], stage.added)
        except UserError:  # it chooses nothing: what decides stands
            say(f"warning: {entry.name} has the same score for all blocks: left out of the comparison")
        else:
            others[entry.name] = record
    result = dict(records[0])
    if others:
        result["compared"] = compared(result, others, stage.added)
    write_json(folder / "scores.json", result)
    table(result, stage.added).to_parquet(folder / "importance.parquet", index=False)
    tell(result, stage)


def take_part(context: Context, stage: Stage) -> None:
    """The candidates of a process that is not the first of its job."""
    job = distributed.job()
    assert job is not None
    for number, entry in enumerate(entries(context.config.score, stage.scorer)):
        if (record := part(context, stage, entry, number)) is not None:
            known(context.step(stage, "score"), number).put(f"rank-{job.rank:03d}", record)
    job.finished()


def part(context: Context, stage: Stage, entry: Entry, number: int) -> dict[str, Any] | None:
    """The record of what this process has to score: of a job's processes each takes its share of what is not known yet,
    the first alone what cannot be scored apart. None where nothing is left for it."""
    job, store = distributed.job(), known(context.step(stage, "score"), number)
    rank, world = (job.rank, job.world) if job is not None else (0, 1)
    blocks = candidates(context, stage)
    if not entry.apart:
        return scorer(entry.scorer)(prepared(context, stage, entry, blocks, None)) if rank == 0 else None
    done, rows = store.records(), store.rows(blocks)
    if rank == 0 and (done or rows):
        say(f"{stage.name}: {len(done | rows)} of {len(blocks)} candidates are scored already")
    mine = [block for block in blocks[rank::world] if block not in done]
    if not mine:
        return None
    record = scorer(entry.scorer)(
        prepared(context, stage, entry, [block for block in mine if block not in rows], store)
    )
    kept = {"blocks": [rows[block] for block in mine if block in rows]}
    return join(entry.scorer, [record, kept])


def whole(context: Context, stage: Stage, entry: Entry, number: int, mine: dict[str, Any] | None) -> dict[str, Any]:
    """One record of all candidates, from this process's and those of others."""
    if not entry.apart:
        assert mine is not None
        return mine
    found = known(context.step(stage, "score"), number).records()
    records = [found[block] for block in candidates(context, stage) if block in found]
    records += [mine] if mine is not None else []
    if missing := set(candidates(context, stage)) - {row["block"] for record in records for row in record["blocks"]}:
        raise UserError(f"{stage.name}: there is no score of blocks {sorted(missing)} yet: the same command continues")
    for key in SHARED:
        if len(values := {record[key] for record in records if key in record}) > 1:
            say(f"warning: {key} is not the same for every candidate ({min(values)} to {max(values)}): unlike machines")
    return join(entry.scorer, records, entry.options, stage.added)


def score_candidate(args: argparse.Namespace) -> int:
    """Score the i-th candidate alone; the run folder is not locked, this candidate is."""
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
    step, entry = context.step(stage, "score"), entries(context.config.score, stage.scorer)[0]
    if not entry.apart:
        raise UserError(f"{stage.name}: {entry.name} scores its candidates together: leave out --candidate")
    block = chosen(candidates(context, stage), args.candidate, stage.name)
    step.check()
    store = known(step)
    if step.done or block in store.records():
        say(f"{stage.name}: block {block} is scored already")
        return 0
    lock.check(context.run_dir / "run.lock", str(context.run_dir))
    step.part()
    store.folder.mkdir(exist_ok=True)
    lock.hold(store.folder / f"{args.candidate:03d}.lock", f"candidate {args.candidate} of {step.name}")
    for path in step.reads:
        verify(path)
    record = scorer(stage.scorer)(prepared(context, stage, entry, [block], None))
    store.put(f"{args.candidate:03d}", record)
    return 0


def prepared(context: Context, stage: Stage, entry: Entry, blocks: Sequence[int], store: Known | None) -> Setup:
    """All that scoring ``blocks`` takes, the models loaded; rows are noted in ``store`` as they come."""
    config, options = context.config, entry.options
    seed = begin(context, stage, SCORING)
    tokenizer = load_tokenizer(config.teacher)
    teacher = RememberingTeacher(load_model(config.teacher, config.dtype))  # every candidate sees the same rows
    read, taken = needs(options, entry.scorer), parts(options, entry.scorer)
    dtype = config.dtype
    if "mmr" in taken or ("rows" in read and stage.start.name != TEACHER):
        dtype = "float32"  # what is trained, or was, has float32 weights
    start, _ = context.before(stage)
    model = load_model(start, dtype)
    set_kernels(model, config.kernels)
    scratch = context.step(stage, "score").partial / "scratch" / fingerprint([entry.name, list(blocks)])
    say(f"{stage.name}: scoring {len(blocks)} blocks with {entry.name}")
    metric: Any = None
    tasks: Any = None
    rows: Any = None
    heldout: Any = None
    if "rows" in read:
        sizes = {  # of training rows, and of held-out tokens
            "mmr": (options.mmr.steps * config.train.batch_size, options.mmr.heldout_tokens),
            "aligned": (rows_to_align(config), options.aligned.heldout_tokens),
        }
        wanted = [sizes.get(each, sizes["aligned"]) for each in taken if needs(options, each) & {"rows"}]
        rows = context.rows(tokenizer, max(count for count, _ in wanted), seed)
        tokens = max(tokens for _, tokens in wanted)
        length = config.data.sequence_length
        heldout = context.rows(tokenizer, -(-tokens // length), HELD_OUT_SEED, held_out=True)
    if "tasks" in read:

        def tasks(names: Sequence[str], questions: int) -> Any:
            return prepare_all(names, tokenizer, model, questions, local_data=config.measure.local_data).compare

    if "metric" in read:
        requests = prepare(
            options.loo.task,
            tokenizer,
            model,
            options.loo.questions,
            few_shot=None if options.loo.few_shot < 0 else options.loo.few_shot,
            local_data=config.measure.local_data,
        )
        if len(requests.gold) < FEW:
            say(f"warning: {len(requests.gold)} questions rank blocks poorly; at least {FEW} are wanted")
        countdown = Countdown(f"{stage.name}: {entry.name}", 1.0)
        metric = partial(requests.compare, progress=countdown.reach, journal=scratch / "values.jsonl")

    def report(block: int, row: dict[str, float]) -> None:
        check_finite(entry.name, row)
        if store is not None:
            store.add(row)
        figures = "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("block", "score")
        )
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
        tasks=tasks,
        added=stage.added,
        kept=context.step(stage, "score").partial / mixer_store.FOLDER,
        fingerprint=mixers_of(context.step(stage, "score"), options),
    )


def table(record: dict[str, Any], added: int) -> pd.DataFrame:
    """A row for every score and block: ``scorer``, ``decides``, ``block``, ``score``, ``rank`` (1: the least
    important), ``chosen``, and what else the score has."""
    rows = []
    named = [(record["scorer"], record), *((each["scorer"], each) for each in record.get("compared", []))]
    for number, (name, part) in enumerate(named):
        ranks = {block: rank for rank, block in enumerate(part["order"], 1)}
        for row in part["blocks"]:
            rank = ranks.get(row["block"])
            common = {"scorer": name, "decides": number == 0, "block": row["block"], "score": row["score"]}
            own = {key: value for key, value in row.items() if key not in common}
            rows.append({**common, "rank": rank, "chosen": rank is not None and rank <= added, **own})
    return pd.DataFrame(rows)


def tell(record: dict[str, Any], stage: Stage) -> None:
    """Say what came out."""
    say(f"  least important first: {record['order']}")
    halving = record.get("halving", {})
    if "saved" in halving:
        say(f"  halving ran {halving['steps_run']:,} of {halving['steps_full']:,} steps ({halving['saved']:.0%} saved)")
    if "would_choose" in halving:
        other = f"choose {halving['would_choose']}" if halving["changes_choice"] else "choose the same"
        say(f"  halving would {other}, and save {halving['would_save']:.0%} of the steps")
    for each in record.get("compared", []):
        same = f"{each['same_choice']} of {stage.added} blocks chosen alike"
        say(f"  {each['scorer']}: rank correlation {each['spearman']:.2f}, {same}; {each['order']}")
