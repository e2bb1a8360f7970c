"""A run: its folders, its rows, and its steps with what each depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.config import DataConfig, Origin, RunConfig, ScoreConfig
from distill.data.mixture import load_data
from distill.errors import UserError, choose
from distill.importance import COMBINED, OPTIONS, needs, taken
from distill.importance.comparison import entries
from distill.mixers import available
from distill.placement import ATTENTION, tuned_name
from distill.records import Step, fingerprint, read_record
from distill.schedule import Stage
from stages.lineage import kept

LATER = (
    "bc_norm", "blocks", "split", "subset", "revision", "columns", "too_long", "streaming", "shuffle_buffer",
    "learning_rates", "freeze", "on_bad_loss", "spike", "teacher_mode", "teacher_top_k", "lockstep", "halving",
    "halving_check",
)  # fmt: skip
"""Keys that earlier versions did not have, and whose defaults are what those did."""
LATER_MEASURED = ("few_shot", "temperature", "top_p", "samples", "reasoning_start", "reasoning_end")
"""The same of ``measure`` and ``score.loo``."""


OFFLINE = "offline"
"""The ``train.teacher_mode`` that changes what is learned: where the others have the teacher is no matter."""
ALIGNED = "aligned"
"""The score whose options say how mixers are aligned, and the ``mixer.init`` by which they are."""
SCORING = 1
"""The purpose (``Context.seed``) of the rows that importance scores train on."""
WITHOUT_EFFECT = ("keep_checkpoints", "keep_best", "data_workers")
"""Keys of a training that change nothing of what it ends with."""
SCORED_ALIKE = ("candidates_at_once", "at_once")
"""Keys of a score that change no bit of it."""


def inputs_of(part: Any, later: Sequence[str] = LATER) -> dict[str, Any]:
    """A part of the config for fingerprints, without the keys in ``later`` that have their defaults: what an earlier
    version finished still counts."""
    usual, kept = vars(type(part)()), asdict(part)
    for key in later:
        if key in kept and kept[key] == usual[key]:
            del kept[key]
    if "mixture" in kept:
        kept["mixture"] = [inputs_of(entry) for entry in part.mixture]
    return kept


def score_inputs(config: ScoreConfig, name: str) -> dict[str, Any]:
    """A score and its own options, for fingerprints."""
    if name == COMBINED:
        return {"scorer": name, "parts": [score_inputs(config, part) for part in config.combine]}
    own = getattr(config, OPTIONS.get(name, name), {})
    kept = inputs_of(own, (*LATER, *LATER_MEASURED)) if dataclasses.is_dataclass(own) else {name: own}
    return {"scorer": name, **{key: value for key, value in kept.items() if key not in SCORED_ALIKE}}


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
        return str(model), self.placement(source)["mixers"]

    def placement(self, stage: Stage) -> dict[str, Any]:
        """What ``place`` wrote: ``mixers`` (the mixer of every block) and ``added``; UserError for a broken record."""
        file = self.folder(stage, "place") / "placement.json"
        record = read_record(file, mixers=list[str], added=list[int])
        if len(record["mixers"]) != stage.num_blocks:
            raise UserError(
                f"{file} is broken: {len(record['mixers'])} mixers for {stage.num_blocks} blocks\n"
                f"remove {file.parent} and run 'distill place' again"
            )
        for mixer in set(record["mixers"]) - {ATTENTION}:
            choose(f"mixer in {file}:", mixer, available())
        return record

    @property
    def sft_source(self) -> DataConfig:
        """What a fine-tuning is trained on: ``sft.source``, or the run's own data."""
        own = {field.name: getattr(self.config.sft, field.name) for field in dataclasses.fields(Origin)}
        return dataclasses.replace(self.config.data, mixture=[], **own) if own["source"] else self.config.data

    def rows(
        self, tokenizer: Any, count: int, seed: int, *, held_out: bool = False, data: DataConfig | None = None
    ) -> Any:
        """Packed rows of the run's data, or of other ``data``; the seed says which."""
        return load_data(data or self.config.data, tokenizer, count, seed, held_out=held_out)

    def seed(self, stage: Stage, purpose: int) -> int:
        """A seed for one purpose within one stage: no two share data or dropout."""
        return (self.config.seed * 1000 + stage.index * 10 + purpose) % 2**32

    def steps(self) -> list[Step]:
        """Every step in order, each with the inputs that it depends on: those of the run, then the fine-tunings, then
        the measures of GGUF files."""
        more = [step for stage in self.stages for step in (*self.sft_steps(stage), *self.gguf_steps(stage))]
        return [*self.run_steps(), *more]

    def gguf_steps(self, stage: Stage) -> list[Step]:
        """What was measured of a stage's GGUF files: it goes when the training goes that they came from."""
        trained = self.step(stage, "train")
        return [
            Step(f"gguf/{folder.name}/measure", folder / "measure", {}, {trained.name: trained.fingerprint})
            for folder in sorted((self.run_dir / "gguf").glob(f"{stage.folder}-*"))
        ]

    def run_steps(self) -> list[Step]:
        """The steps of the run itself: the teacher's measure, then stage by stage."""
        config = self.config
        base = {"teacher": self.teacher, "seed": config.seed, "dtype": config.dtype}
        trained_on = self.computed()
        data, train, mixer = inputs_of(config.data), inputs_of(config.train), inputs_of(config.mixer)
        for key in ("steps", "steps_by_stage", "save_steps", "keep_steps", *WITHOUT_EFFECT):
            train.pop(key)
        for key in ("teacher_mode", "teacher_top_k"):
            train.pop(key, None)
        offline = config.train.teacher_mode == OFFLINE
        stored = {"teacher_top_k": config.train.teacher_top_k} if offline else {}
        # which rows are read, in which batches; and what the gap is measured with
        read = {key: train[key] for key in ("batch_size", "gradient_accumulation", "eval_rows", "loss", "temperature")}
        for unused in dataclasses.fields(Origin) if config.data.mixture else ():
            data.pop(unused.name, None)
        if not config.data.mixture:
            data.pop("mixture")
        by_block = {"blocks": config.mixer.blocks} if config.mixer.blocks else {}
        aligned: dict[str, Any] = {}
        data["content"] = self.data
        if config.mixer.init == ALIGNED:
            size = {"batch_size": config.train.batch_size}
            options = {key: value for key, value in asdict(config.score.aligned).items() if key != "at_once"}
            aligned = {"aligned": {**size, **options}, "data": data, **trained_on}
        measure = self.measured()
        steps = [Step("teacher", self.run_dir / "teacher", {**base, "measure": measure}, {})]
        ends: list[dict[str, str]] = []  # the training of every stage
        for stage in self.stages:
            start = stage.start
            reads = self.reads(stage)
            chosen = {"start": self.starts.get(start.path, start.name)} if stage.branches else {}
            score = self.scored(stage)
            trains = any("rows" in needs(config.score, name) for name in taken(config.score, stage.scorer))
            trained = {"data": data, "train": train, "mixer": mixer} if trains else {}
            cached = {**base, "steps": stage.steps, **read, **stored, "data": data, **trained_on}
            inputs = {
                "score": {**chosen, **base, "score": score, **trained, **trained_on},
                "place": {"added": stage.added, "mixer": config.mixer.name, **by_block},
                "swap": {**base, "mixer": mixer, **aligned},
                **({"cache": cached} if offline else {}),
                "train": {**base, "steps": stage.steps, "train": {**train, **stored}, "data": data, **trained_on},
                "measure": {**base, "measure": measure, "kernels": config.kernels},
            }
            after = {} if start.stage is None else ends[start.stage]
            for name, values in inputs.items():
                step = Step(f"{stage.folder}/{name}", self.folder(stage, name), values, dict(after), reads[name])
                steps.append(step)
                after = {step.name: step.fingerprint}
                if name == "train":
                    ends.append(after)
        return steps

    def reads(self, stage: Stage) -> dict[str, tuple[Path, ...]]:
        """What each step of a stage opens of what others wrote."""
        model: tuple[Path, ...] = (Path(stage.start.path),) if stage.start.path else ()
        mixers: tuple[Path, ...] = ()
        if stage.start.stage is not None:
            source = self.stages[stage.start.stage]
            model, mixers = (self.checkpoint(source, stage.start.step),), (self.folder(source, "place"),)
        scored = (self.folder(stage, "score"),) if self.config.mixer.init == ALIGNED else ()
        train, cache = self.folder(stage, "train"), self.folder(stage, "cache")
        return {
            "score": (*model, *mixers),
            "place": (self.folder(stage, "score"), *mixers),
            "swap": (self.folder(stage, "place"), *scored, *model),
            "cache": (self.folder(stage, "swap"),),
            "train": (self.folder(stage, "swap"), *([cache] if self.config.train.teacher_mode == OFFLINE else [])),
            "measure": (train / "checkpoint", train / "train.json"),
        }

    def sft_steps(self, stage: Stage) -> list[Step]:
        """The steps that fine-tune a stage's distilled model, merge it and measure it."""
        config, sft = self.config, self.config.sft
        base = {"seed": config.seed, "dtype": config.dtype}
        origin = [field.name for field in dataclasses.fields(Origin)]  # it is part of the data
        keys = ("weight_decay", "beta2", "max_grad_norm", "eval_rows", "gradient_checkpointing")
        train = {key: getattr(config.train, key) for key in keys}
        tuned = {key: value for key, value in asdict(sft).items() if key not in ("alpha", "save_steps", *origin)}
        data = {**inputs_of(self.sft_source), "content": self.sft_data}
        inputs = {
            "train": {**base, "sft": tuned, "train": train, "data": data, **self.computed()},
            "merge": {"alpha": sft.alpha},
            "measure": {**base, "measure": self.measured(), "kernels": config.kernels},
        }
        trained = self.step(stage, "train")
        tuned_model = self.tuned_folder(stage, "train")
        reads = {
            "train": (self.checkpoint(stage),),
            "merge": (self.checkpoint(stage), tuned_model),
            "measure": (self.tuned_folder(stage, "merge"), tuned_model / "train.json"),
        }
        steps, after = [], {trained.name: trained.fingerprint}
        for name, values in inputs.items():
            folder = self.tuned_folder(stage, name)
            steps.append(Step(f"{folder.parent.name}/{name}", folder, values, after, reads[name]))
            after = {steps[-1].name: steps[-1].fingerprint}
        return steps

    def scored(self, stage: Stage) -> dict[str, Any]:
        """What of the config decides the scores of a stage."""
        options = self.config.score
        named: dict[str, Any] = {"blocks": list(options.blocks)} if options.blocks else {}
        if others := entries(options, stage.scorer)[1:]:  # their places say where what is known of them is kept
            own = [score_inputs(entry.options, entry.scorer) for entry in others]
            named["compare"] = {f"{number} {each.name}": own[number] for number, each in enumerate(others)}
        if set(taken(options, stage.scorer)) & OPTIONS.keys():  # these go on until so many blocks are chosen
            named["added"] = [stage.added]
        return {**score_inputs(options, stage.scorer), **named}

    def computed(self) -> dict[str, Any]:
        """What besides the config decides the bits that a training ends with."""
        return {"threads": self.threads, "kernels": self.config.kernels}

    def measured(self) -> dict[str, Any]:
        """What of the config decides what is measured (consent to run code and where copies lie change no figure)."""
        unread = ("allow_code_execution", "local_data")
        return {
            key: value for key, value in inputs_of(self.config.measure, LATER_MEASURED).items() if key not in unread
        }

    def step(self, stage: Stage, name: str) -> Step:
        """One step of a stage."""
        return next(s for s in self.run_steps() if s.name == f"{stage.folder}/{name}")


def rows_to_align(config: RunConfig) -> int:
    """How many training rows an alignment of mixers takes."""
    return config.score.aligned.steps * (config.score.aligned.batch_size or config.train.batch_size)


def mixers_of(step: Step, options: ScoreConfig) -> str:
    """Of all that the aligned mixers of a score step depend on, taken with these options."""
    own = {key: value for key, value in asdict(options.aligned).items() if key not in ("at_once", "heldout_tokens")}
    return fingerprint([step.fingerprint, own])


def need(path: Path, verb: str) -> Path:
    """``path``, which the verb must have written before."""
    if not path.exists():
        raise UserError(f"{path} is missing: run 'distill {verb}' on this run first")
    return path
