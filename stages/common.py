"""What every verb shares: opening a run, its seeds and data, and its steps with what each depends on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from distill.config import DataConfig, RunConfig, dump_config, load_config
from distill.data.mixture import check_data, load_data
from distill.data.traces import EMBEDDED
from distill.errors import UserError
from distill.hybrid.surgery import hybrid_config
from distill.placement import ATTENTION, parse_name, replace, tuned_name
from distill.records import Step, dependents, fingerprint, forget, read_json, write_text
from distill.schedule import Stage
from distill.teacher import load_config as load_model_config
from distill.teacher import resolve
from eval.accuracy import task_manager
from stages.lineage import kept, misplaced, stages_of, unrecorded
from stages.targets import read_config

HELD_OUT_SEED = 90_001  # validation rows: the same for every stage and candidate


def set_threads(threads: int) -> int:
    """Fix the number of CPU threads (0: one a core); returns it."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


@dataclass
class Context:
    """A run: its config, its teacher's shape, its stages."""

    config: RunConfig
    run_dir: Path
    stages: list[Stage]
    threads: int
    teacher: str
    """What the teacher is, for fingerprints: its config, and the contents of its files."""
    data: Any
    """What the data files hold, for fingerprints."""
    sft_data: Any = ""
    """The same of the traces for fine-tuning."""
    starts: dict[str, str] = field(default_factory=dict)
    """What the hybrids hold that stages start from, by folder, for fingerprints."""

    def folder(self, stage: Stage, step: str) -> Path:
        """Where a step of a stage writes."""
        return self.run_dir / "stages" / stage.folder / step

    def checkpoint(self, stage: Stage, step: int | None = None) -> Path:
        """The distilled model of a stage, or what it was after ``step`` steps (if those are kept)."""
        folder = self.folder(stage, "train")
        return folder / "checkpoint" if step is None else kept(folder, step)

    def tuned_folder(self, stage: Stage, step: str) -> Path:
        """Where a step of a stage's fine-tuning writes."""
        return self.run_dir / "posttrain" / tuned_name(stage.folder) / step

    def before(self, stage: Stage) -> tuple[str, list[str]]:
        """What a stage starts from: the model (a name or folder) and its placement, the mixer of every block.

        Raises UserError while the earlier stage has not been trained.
        """
        start = stage.start
        if start.stage is None:
            return start.path or self.config.teacher, list(start.mixers) or [ATTENTION] * stage.num_blocks
        source = self.stages[start.stage]
        model = need(self.checkpoint(source, start.step), "train")
        return str(model), read_json(self.folder(source, "place") / "placement.json")["mixers"]

    @property
    def sft_source(self) -> DataConfig:
        """What a fine-tuning is trained on: ``sft.source``, or the run's own data."""
        source = self.config.sft.source
        return dataclasses.replace(self.config.data, source=source, mixture=[]) if source else self.config.data

    def rows(
        self, tokenizer: Any, count: int, seed: int, *, held_out: bool = False, data: DataConfig | None = None
    ) -> Any:
        """Packed rows of the run's data, or of other ``data``; the seed says which."""
        return load_data(data or self.config.data, tokenizer, count, seed, held_out=held_out)

    def seed(self, stage: Stage, purpose: int) -> int:
        """A seed for one purpose within one stage: no two share data or dropout."""
        return (self.config.seed * 1000 + stage.index * 10 + purpose) % 2**32

    def steps(self) -> list[Step]:
        """Every step in order, each with the inputs that it depends on: those of the run, then the fine-tunings."""
        return [*self.run_steps(), *(step for stage in self.stages for step in self.sft_steps(stage))]

    def run_steps(self) -> list[Step]:
        """The steps of the run itself: the teacher's measure, then stage by stage."""
        config = self.config
        base = {"teacher": self.teacher, "seed": config.seed, "dtype": config.dtype}
        trained_on = self.computed()
        data, train, mixer = asdict(config.data), asdict(config.train), asdict(config.mixer)
        for key in ("steps", "steps_by_stage", "save_steps", "keep_steps"):
            train.pop(key)
        data.pop("source" if config.data.mixture else "mixture")  # the one that is not used
        data["content"] = self.data
        measure = asdict(config.measure)
        steps = [Step("teacher", self.run_dir / "teacher", {**base, "measure": measure}, {})]
        ends: list[dict[str, str]] = []  # the training of every stage
        for stage in self.stages:
            start = stage.start
            chosen = {"start": self.starts.get(start.path, start.name)} if stage.branches else {}
            score = {"scorer": stage.scorer, **asdict(getattr(config.score, stage.scorer))}
            trained = {} if stage.scorer == "loo" else {"data": data, "train": train, "mixer": mixer}
            inputs = {
                "score": {**chosen, **base, "score": score, **trained, **trained_on},
                "place": {"added": stage.added, "mixer": config.mixer.name},
                "swap": {**base, "mixer": mixer},
                "train": {**base, "steps": stage.steps, "train": train, "data": data, **trained_on},
                "measure": {**base, "measure": measure, "kernels": config.kernels},
            }
            after = {} if start.stage is None else ends[start.stage]
            for name, values in inputs.items():
                step = Step(f"{stage.folder}/{name}", self.folder(stage, name), values, dict(after))
                steps.append(step)
                after = {step.name: step.fingerprint}
                if name == "train":
                    ends.append(after)
        return steps

    def sft_steps(self, stage: Stage) -> list[Step]:
        """The steps that fine-tune a stage's distilled model, merge it and measure it."""
        config, sft = self.config, self.config.sft
        base = {"seed": config.seed, "dtype": config.dtype}
        keys = ("weight_decay", "beta2", "max_grad_norm", "eval_rows", "gradient_checkpointing")
        train = {key: getattr(config.train, key) for key in keys}
        tuned = {key: value for key, value in asdict(sft).items() if key not in ("alpha", "save_steps", "source")}
        data = {**asdict(self.sft_source), "content": self.sft_data}
        inputs = {
            "train": {**base, "sft": tuned, "train": train, "data": data, **self.computed()},
            "merge": {"alpha": sft.alpha},
            "measure": {**base, "measure": asdict(config.measure), "kernels": config.kernels},
        }
        trained = self.step(stage, "train")
        steps, after = [], {trained.name: trained.fingerprint}
        for name, values in inputs.items():
            folder = self.tuned_folder(stage, name)
            steps.append(Step(f"{folder.parent.name}/{name}", folder, values, after))
            after = {steps[-1].name: steps[-1].fingerprint}
        return steps

    def computed(self) -> dict[str, Any]:
        """What besides the config decides the bits that a training ends with."""
        return {"threads": self.threads, "kernels": self.config.kernels}

    def step(self, stage: Stage, name: str) -> Step:
        """One step of a stage."""
        return next(s for s in self.run_steps() if s.name == f"{stage.folder}/{name}")


def open_run(
    target: str,
    overrides: list[str],
    *,
    force: bool = False,
    write: bool = True,
    also: Callable[[Context], list[Step]] | None = None,
) -> Context:
    """Open the run that CONFIG or RUN names: check everything that can be checked before work is spent.

    With ``write`` the resolved config goes to ``run.yaml``, and what was finished with other inputs is refused, or
    (``force``) forgotten together with all that depends on it: steps of the run, and those that ``also`` names (a
    fine-tuning is checked only by the verb that does it).
    """
    config = read_config(target, overrides)
    existing = Path(config.run_dir).expanduser() / "run.yaml"
    if not config.threads and existing.is_file():  # a run keeps its number of threads on another machine
        config.threads = load_config(RunConfig, existing).threads
    threads = set_threads(config.threads)
    model = load_model_config(config.teacher)
    stages = stages_of(config, model)
    first = replace([ATTENTION] * model.num_hidden_layers, [0], config.mixer.name)
    hybrid_config(model, first, config.mixer)  # the mixer's options fit the teacher's shape
    if write:
        check_data(config.data)
        task_manager([config.score.loo.task, *config.measure.generative, *config.measure.multiple_choice])
    config.threads = threads
    teacher, data = identity(config.teacher, model), data_identity(config.data)
    folders = {stage.start.path for stage in stages} - {""}
    starts = {folder: f"hybrid {identity(folder, load_model_config(folder))}" for folder in sorted(folders)}
    context = Context(config, Path(config.run_dir).expanduser(), stages, threads, teacher, data, data, starts)
    if config.sft.source:
        context.sft_data = data_identity(context.sft_source)
    if write:
        check_finished(context, also(context) if also else [], force=force)
        for line in unrecorded(stages):
            say(f"warning: {line}")
        try:
            context.run_dir.mkdir(parents=True, exist_ok=True)
            write_text(context.run_dir / "run.yaml", dump_config(config))
        except OSError as error:
            raise UserError(f"cannot write to run_dir={config.run_dir}: {error.strerror}") from error
    return context


def check_finished(context: Context, also: list[Step], *, force: bool) -> None:
    """Refuse what was finished with other inputs, or (``force``) remove it together with all that depends on it."""
    for folder, stage in misplaced(context.run_dir, context.stages).items():
        if not force:
            raise UserError(
                f"{folder} was made as stage {int(folder.name.split('-')[0])} of the schedule, and {stage.name} is now "
                f"stage {stage.index + 1}: put new stages at the end (start_from says where each starts), take "
                "another run_dir, or use --force to redo it under its new number"
            )
        shutil.rmtree(folder)
    steps = context.steps()
    stale: set[str] = set()
    for step in [*context.run_steps(), *also]:
        if step.name in dependents(steps, stale):
            continue
        try:
            step.check()
            check_kept(context, step)
        except UserError:
            if not force:
                raise
            stale.add(step.name)
    forget(steps, stale)


def check_kept(context: Context, step: Step) -> None:
    """Raise UserError where ``step`` is a finished training that did not keep what a later stage has to start from."""
    for stage in context.stages:
        start = stage.start
        if start.stage is None or start.step is None or context.step(stage, "swap").done:
            continue
        source = context.stages[start.stage]
        model = context.checkpoint(source, start.step)
        if step.done and step.folder == context.folder(source, "train") and not model.is_dir():
            found = ", ".join(str(int(path.name)) for path in sorted(model.parent.glob("[0-9]*"))) or "none"
            raise UserError(
                f"start_from.H1-{stage.replaced}={start.name}: {source.name} is trained already, and step {start.step} "
                f"was not kept (kept: {found}). Start from one of those or from its end (H1-{source.replaced}), or "
                f"use --force to train {source.name} again and redo what depends on it"
            )


def content(path: Path) -> str:
    """A hash of a file: all of it, or for a large one 64 blocks of 1 MiB spread over it, and its size."""
    size, block = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= 64 * block:
            digest.update(file.read())
        else:
            for part in range(64):
                file.seek(part * (size - block) // 63)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def identity(name: str, config: Any) -> str:
    """A fingerprint of a model: its config, weights and tokenizer; of one on the hub, its revision."""
    keys = json.loads(config.to_json_string())
    keys.pop("transformers_version", None)
    folder = Path(resolve(name))
    if not folder.is_dir():
        return fingerprint([keys, getattr(config, "_commit_hash", None)])
    files = [path for kind in ("*.safetensors", "*.json", "*.jinja", "*.model") for path in folder.glob(kind)]
    skipped = ("config.json", "model.safetensors.index.json", "scores.json")
    return fingerprint([keys, [[path.name, content(path)] for path in sorted(files) if path.name not in skipped]])


def data_identity(data: DataConfig) -> str | dict[str, str]:
    """A fingerprint of the data file, or of each in the mixture; the embedded data follow from the seed."""
    if data.mixture:
        return {entry.source: source_identity(entry.source) for entry in data.mixture}
    return source_identity(data.source)


def source_identity(source: str) -> str:
    """A fingerprint of one source."""
    path = Path(source).expanduser()
    return content(path) if source != EMBEDDED and path.is_file() else source


def find_stage(context: Context, name: str | None, step: str) -> Stage | None:
    """The stage that ``--stage`` names, or the first in which ``step`` is not done; None when all are."""
    if name is None:
        return next((stage for stage in context.stages if not context.step(stage, step).done), None)
    if name.isdigit() and 1 <= int(name) <= len(context.stages):
        return context.stages[int(name) - 1]
    names = {stage.name: stage for stage in context.stages}
    if not name.isdigit():
        replaced, blocks = parse_name(name)
        for stage in context.stages:
            if stage.replaced == replaced and blocks in (None, stage.num_blocks):
                return stage
    raise UserError(f"no stage '{name}'; this run has {', '.join(names)} (or 1 to {len(names)})")


def need(path: Path, verb: str) -> Path:
    """``path``, which the verb must have written before."""
    if not path.exists():
        raise UserError(f"{path} is missing: run 'distill {verb}' on this run first")
    return path


def stage_main(args: argparse.Namespace, step: str, perform: Callable[[Context, Stage], bool]) -> int:
    """The main of a verb that does one step of one stage."""
    context = open_run(args.target, args.overrides, force=args.force)
    stage = find_stage(context, args.stage, step)
    if stage is None:
        if args.force:
            raise UserError(f"{step} is done in every stage: --force needs --stage to say which to redo")
        say(f"{step} is done in every stage of {context.run_dir}")
        return 0
    if args.force:
        forget(context.steps(), {f"{stage.folder}/{step}"})
    if not perform(context, stage):
        say(f"{stage.name}: {step} is done already")
    return 0


def begin(context: Context, stage: Stage, purpose: int) -> int:
    """Seed everything for a step; returns the seed."""
    seed = context.seed(stage, purpose)
    set_seed(seed)
    return seed
