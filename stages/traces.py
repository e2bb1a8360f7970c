"""Make training data from the teacher itself: sample completions of prompts, keep the good ones.

    distill traces --teacher embedded --prompts embedded --output traces.jsonl
    distill traces --teacher /models/my-llama --prompts questions.jsonl --samples 4 --max-new-tokens 4096
    distill traces --show 3 my.yaml

DATA is ``embedded``, or a JSONL file: a row has ``prompt`` (text) or ``messages``, and may have ``answer``. What is
dropped: completions that did not end, that are too short, that are there already and, where the row has an answer,
that do not give it (after the last </think>, or in the last \\boxed{}). The output is ready for
``distill run CONFIG data.source=traces.jsonl``; what was dropped and why stands in ``traces.record.json`` beside it.
Interrupted, the same command continues, and ends with the same file.

With --show nothing is sampled: N packed rows of a CONFIG's data are printed as a training reads them, with where each
document begins and what is learned (coloured on a terminal, in brackets elsewhere), and what the data hold.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distill.config import Origin
from distill.data.prompts import Prompt, embedded_prompts, read_prompts
from distill.data.sample import Completion, Question, Sampling, Sieve, render, sample, trace
from distill.data.sources import EMBEDDED
from distill.errors import UserError, choose, nearest
from distill.lock import hold
from distill.records import differences, provenance, read_record, write_json, write_text
from distill.teacher import DTYPES, check_files, load_model, load_tokenizer, trust_code
from distill.teacher import load_config as load_model_config
from stages import show
from stages.common import say, set_threads
from stages.identity import identity, source_identity

EMBEDDED_PROMPTS = 256  # taken where no --limit is given
TOO_LONG = "prompt too long"
SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Files:
    """What is written: the traces, the record beside them, and what is there until both are whole."""

    output: Path

    @property
    def record(self) -> Path:
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + ".record.json")

    @property
    def lock(self) -> Path:
        return self.output.with_name(self.output.name + ".lock")

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")


def main(args: argparse.Namespace) -> int:
    if args.show is not None:
        return show.main(args)
    if not args.teacher or not args.prompts:
        args.refuse("the following arguments are required: --teacher, --prompts")
    if args.target or args.overrides:
        args.refuse(f"unrecognized arguments: {' '.join([args.target, *args.overrides])} (they are for --show)")
    sampling = read_sampling(args)
    files = Files(Path(args.output).expanduser())
    if files.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: give a file")
    prompts = load_prompts(args.prompts, args.limit, args.seed, files)
    trust_code(args.teacher, args.trust_remote_code)
    teacher = load_model_config(args.teacher, convertible=False)
    source = source_identity(Origin(source=args.prompts))
    drawn = {
        "teacher": {"name": args.teacher, "content": identity(args.teacher, teacher), "dtype": args.dtype},
        "prompts": {
            "source": args.prompts,
            "content": source,
            "limit": args.limit,
        },
        "sampling": asdict(sampling),
    }
    settings = {**drawn, "filters": {"min_tokens": args.min_tokens, "keep_wrong": args.keep_wrong}}
    if is_done(files, settings, args.force):
        files.partial.unlink(missing_ok=True)  # still there if the last moment was cut short
        say(f"{files.output} is done already")
        return 0
    check_files(args.teacher)
    tokenizer = load_tokenizer(args.teacher)
    questions = render(tokenizer, prompts)
    window = getattr(teacher, "max_position_embeddings", None) or float("inf")
    fitting = [question for question in questions if len(question.ids) + sampling.max_new_tokens <= window]
    if not fitting:
        raise UserError(
            f"no prompt leaves room for --max-new-tokens {sampling.max_new_tokens} in the teacher's {window} positions"
        )
    partial = Partial(files, drawn, args.threads, args.force)
    work = [question for question in fitting for _ in range(sampling.samples)]
    sieve = Sieve(args.min_tokens, args.keep_wrong)
    if too_long := (len(questions) - len(fitting)) * sampling.samples:
        sieve.rejected[TOO_LONG] = too_long
    say(f"{args.teacher}: {len(fitting)} prompts, {len(work)} completions of at most {sampling.max_new_tokens} tokens")
    rows = make(args, tokenizer, work, sampling, sieve, partial)
    finish(files, settings, rows, sieve, partial)
    return 0


def read_sampling(args: argparse.Namespace) -> Sampling:
    """How to sample, every option checked."""
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    sampling.check()
    choose("--dtype", args.dtype, DTYPES)
    for name in ("limit", "min_tokens", "threads"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 0")
    if args.min_tokens > args.max_new_tokens:
        raise UserError(f"--min-tokens {args.min_tokens} is above --max-new-tokens {args.max_new_tokens}")
    return sampling


def load_prompts(source: str, limit: int, seed: int, files: Files) -> list[Prompt]:
    """The prompts that ``--prompts`` names, all of them checked."""
    if source == EMBEDDED:
        return embedded_prompts(limit or EMBEDDED_PROMPTS, seed)
    path = Path(source).expanduser()
    if not path.is_file():
        near = nearest(source, [EMBEDDED, *(str(found) for found in path.parent.glob("*.jsonl"))])
        raise UserError(f"--prompts: no such file: {source}{near}; give '{EMBEDDED}' or a JSONL file")
    if path.resolve() in [file.resolve() for file in (files.output, files.record, files.partial)]:
        raise UserError(f"--output {files.output} would overwrite the prompts")
    return read_prompts(path, limit)


def is_done(files: Files, settings: dict[str, Any], force: bool) -> bool:
    """Whether the traces are there, made with these settings, and not to be made anew.

    Raises UserError where they were made with others (unless ``force``), or are not this command's.
    """
    if not files.output.exists():
        return False
    if not files.record.is_file():
        raise UserError(f"{files.output} is there, and not of this command's making: give another --output")
    if force:
        return False
    refuse_other(files.output, read_record(files.record, settings=dict)["settings"], settings)
    return True


def refuse_other(path: Path, old: Any, new: Any) -> None:
    """Raise UserError with the differences where ``path`` was made with other settings."""
    if changed := differences(old, new):
        raise UserError(
            f"{path} was made with other settings:\n  " + "\n  ".join(changed[:3]) + "\n"
            "use --force to begin anew, or another --output"
        )


class Partial:
    """Finished batches on disk: a line of settings, then a line a batch, each written through before the next begins.

    A line that was cut short is dropped. The last bits of a logit depend on the number of threads, so what was begun
    goes on with that which it began with, unless ``threads`` says another (0: as begun, or one a core).
    """

    def __init__(self, files: Files, settings: dict[str, Any], threads: int, force: bool) -> None:
        self.path = path = files.partial
        self.batches: list[list[Completion]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hold(files.lock, str(files.output))
            if force:
                files.output.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            with open(path, "a+b") as file:
                file.seek(0)
                whole = file.read()
                whole = whole[: whole.rfind(b"\n") + 1]
                file.truncate(len(whole))
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error
        lines = whole.splitlines()
        if not lines:
            self.threads = set_threads(threads)
            self._append({"settings": settings, "threads": self.threads})
            return
        try:
            header, *rest = [json.loads(line) for line in lines]
            self.threads, old = header["threads"], header["settings"]
            self.batches = [[Completion(**each) for each in row["completions"]] for row in rest]
            if [row["batch"] for row in rest] != list(range(len(rest))):
                raise ValueError("batches that do not follow one another: two processes wrote at once")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): use --force to begin anew, or another --output") from error
        refuse_other(path, old, settings)
        self.threads = set_threads(threads or self.threads)

    def append(self, batch: Sequence[Completion]) -> None:
        """Add a finished batch."""
        self._append({"batch": len(self.batches), "completions": [asdict(each) for each in batch]})
        self.batches.append(list(batch))

    def _append(self, value: Any) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def make(
    args: argparse.Namespace,
    tokenizer: Any,
    work: list[Question],
    sampling: Sampling,
    sieve: Sieve,
    partial: Partial,
) -> list[dict[str, Any]]:
    """Sample every batch that is not there yet; returns the rows that are kept, in order."""
    batches = [work[start : start + sampling.batch_size] for start in range(0, len(work), sampling.batch_size)]
    begun = len(partial.batches)
    if begun:
        say(f"continuing after batch {begun} of {len(batches)}")
    rows: list[dict[str, Any]] = []
    for number, completions in enumerate(partial.batches):
        rows += keep(tokenizer, batches[number], completions, number * sampling.batch_size, sampling.samples, sieve)
    if begun == len(batches):
        return rows
    model = load_model(args.teacher, args.dtype, convertible=False)
    began, shown, tokens = time.monotonic(), 0.0, 0
    for number in range(begun, len(batches)):
        batch = batches[number]
        completions = sample(model, tokenizer, [question.ids for question in batch], sampling, number)
        partial.append(completions)
        rows += keep(tokenizer, batch, completions, number * sampling.batch_size, sampling.samples, sieve)
        tokens += sum(completion.tokens for completion in completions)
        now = time.monotonic()
        if now - shown > SAY_SECONDS or number + 1 == len(batches):
            shown, elapsed = now, now - began
            left = elapsed * (len(batches) - number - 1) / (number + 1 - begun)
            say(
                f"traces: {number + 1}/{len(batches)} batches  {sieve.kept} kept"
                f"  {tokens / elapsed:,.0f} tok/s  {left:.0f} s left"
            )
    return rows


def keep(
    tokenizer: Any, batch: list[Question], completions: list[Completion], first: int, samples: int, sieve: Sieve
) -> Iterator[dict[str, Any]]:
    """The rows of a batch that pass the sieve; ``first`` is the number of its first completion."""
    for place, (question, completion) in enumerate(zip(batch, completions, strict=True)):
        kept, correct = sieve.take(question, completion)
        if kept:
            yield {
                **trace(tokenizer, question, completion.text),
                "source": question.source,
                "sample": (first + place) % samples,
                "tokens": completion.tokens,
                "correct": correct,
            }


def finish(files: Files, settings: dict[str, Any], rows: list[dict[str, Any]], sieve: Sieve, partial: Partial) -> None:
    """Write record and traces, and say what was kept and what was not."""
    total = sieve.kept + sum(sieve.rejected.values())
    for name, count in (("sampled", total), ("kept", sieve.kept), *sorted(sieve.rejected.items())):
        say(f"  {name:16s}{count:8,d}{100 * count / total:7.1f}%")
    if sieve.judged:
        say(f"  {'right answers':16s}{sieve.right:8,d}{100 * sieve.right / sieve.judged:7.1f}% of those with an answer")
    if not rows:
        raise UserError(
            f"no completion was kept, so nothing was written ({files.partial} holds them): "
            "other filters (--keep-wrong, --min-tokens) cost nothing, --force begins anew"
        )
    tokens = sum(row["tokens"] for row in rows)
    write_json(
        files.record,
        {
            "output": files.output.name,
            "settings": settings,
            "threads": partial.threads,
            "counts": {
                "sampled": total,
                "kept": sieve.kept,
                "tokens": tokens,
                "judged": sieve.judged,
                "right": sieve.right,
                "rejected": dict(sorted(sieve.rejected.items())),
            },
            "provenance": provenance(),
        },
    )
    write_text(files.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.path.unlink()
    say(f"wrote {files.output}: {len(rows):,} traces of {tokens:,} tokens; {files.record.name} says how they were made")
    say(f"next: distill run CONFIG data.source={files.output}")
