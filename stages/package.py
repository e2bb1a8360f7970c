"""Make a folder that is ready for a model hub: weights, tokenizer, and a model card written from the records.

    distill package runs/demo --stage H1-7 --output my-hybrid
    distill package merged --output my-hybrid --code

CHECKPOINT or RUN. The card says what the model is, how it was made and what was measured beside the teacher; with
``--code`` the folder brings the Python files that ``trust_remote_code=True`` needs where our package is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from distill.config import RunConfig
from distill.data.sources import EMBEDDED, is_hub
from distill.errors import UserError, nearest
from distill.hub.facts import Facts, facts_of, license_of, named
from distill.hub.package import package
from distill.placement import parse_name
from distill.posttrain.merge import checkpoint_folder
from distill.records import read_json
from eval.runs import Run, Stage, read_run
from stages.common import say
from stages.targets import read_config

HEADLINE = ("batch", "output_tokens", "tokens_per_second", "teacher_tokens_per_second", "ratio")
"""What a card tells of the throughput: all of it or nothing."""


def main(args: argparse.Namespace) -> int:
    checkpoint, run = locate(Path(args.target).expanduser(), args.stage)
    facts = facts_of(checkpoint)
    origin = ""
    if run is not None:
        config = read_config(str(run.path), [])
        facts = told_by_run(facts, run, config, checkpoint)
        folder = Path(config.teacher).expanduser()
        origin = str(folder) if config.teacher != EMBEDDED and folder.is_dir() else ""
    output = package(checkpoint, args.output, code=args.code, facts=facts, origin=origin)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    say(f"{facts.name} -> {output}: {size / 2**20:,.1f} MiB, model card in {output / 'README.md'}")
    if not facts.accuracy:
        say("nothing was measured of it yet, and the card says so: 'distill measure' comes before")
    return 0


def locate(target: Path, stage: str | None) -> tuple[Path, Run | None]:
    """The checkpoint that CHECKPOINT or RUN names, and the run that it is part of, if any."""
    if not target.is_dir():
        raise UserError(f"no folder {target}: give a CHECKPOINT (a folder with config.json) or a RUN (with run.yaml)")
    if (target / "run.yaml").is_file():
        run = read_run(target)
        return pick(run, stage), run
    if stage is not None:
        raise UserError(f"--stage={stage} needs a RUN, a folder with run.yaml; {target} is none")
    checkpoint = checkpoint_folder(target)
    folder = next((each for each in checkpoint.resolve().parents[:5] if (each / "run.yaml").is_file()), None)
    return checkpoint, read_run(folder) if folder is not None else None


def place(run: Run, model: Stage) -> Path:
    """Where the checkpoint of a stage, or of what was made of it by further training, lies."""
    stem = f"{model.index:02d}-H1-{parse_name(model.name.removesuffix(f'-{model.tuning}'))[0]}"
    if model.tuning:
        return run.path / "posttrain" / f"{stem}-{model.tuning}" / "merge" / "checkpoint"
    return run.path / "stages" / stem / "train" / "checkpoint"


def pick(run: Run, name: str | None) -> Path:
    """The checkpoint of the stage that ``--stage`` names, or of the last that is distilled."""
    there = {model.name: model for model in run.models if (place(run, model) / "config.json").is_file()}
    if not there:
        raise UserError(f"no stage of {run.path} has been distilled: run 'distill run' or 'distill train' first")
    if name is None:
        return place(run, [model for model in there.values() if not model.tuning][-1])
    for model in there.values():
        short, _, tuning = model.name.partition("/")
        short += tuning.lstrip("0123456789")
        if name in (model.name, short, str(model.index) if not model.tuning else ""):
            return place(run, model)
    raise UserError(f"no distilled stage '{name}'{nearest(name, there)} in {run.path}; it has {', '.join(there)}")


def teacher_named(teacher: str) -> str:
    """How the card calls the teacher: a hub name only where the hub's cache holds it, for seen from another folder
    than the run's, ``models/my-llama`` may be a folder that is not here."""
    cached = not is_hub(teacher) or isinstance(try_to_load_from_cache(teacher, "config.json"), str)
    return named(teacher) if cached else Path(teacher).name


def told_by_run(facts: Facts, run: Run, config: RunConfig, checkpoint: Path) -> Facts:
    """``facts`` with what the run's records say of that checkpoint."""
    facts = replace(facts, teacher=teacher_named(config.teacher), license=license_of(config.teacher))
    facts = replace(facts, trainings=trainings(facts, run, config))
    model = next((each for each in run.models if place(run, each) == checkpoint.resolve()), None)
    if model is None:  # the weights of a step that was kept, or before a merge
        return facts
    facts = replace(facts, name=model.name, versions=versions(checkpoint.parent))
    measure = model.records["measure"]
    if measure is None:
        return facts
    head, parameters = measure.get("headline") or {}, measure.get("parameters")
    return replace(
        facts,
        accuracy=measure["accuracy"],
        teachers_accuracy=(run.teacher or {}).get("accuracy", ()),
        headline=head if all(isinstance(head.get(key), (int, float)) for key in HEADLINE) else {},
        speeds=measure["throughput"],
        parameters=parameters if isinstance(parameters, int) else 0,
    )


def trainings(facts: Facts, run: Run, config: RunConfig) -> list[Mapping[str, Any]]:
    """The lineage with losses and seed, for those of its entries that this run made."""
    records = {model.name: model.records["train"] for model in run.models}
    found: list[Mapping[str, Any]] = []
    for entry in facts.lineage:
        record = records.get(str(entry.get("name"))) if entry.get("run", config.name) == config.name else None
        if not record:
            found.append(entry)
            continue
        known = {"seed": config.seed, "sequence_length": config.data.sequence_length, "loss": record.get("loss")}
        if record.get("steps") == entry.get("steps"):  # a start in the middle of a stage has other losses
            known |= {key: record.get(key) for key in ("eval_loss_start", "eval_loss_end")}
        data = " + ".join(part.source for part in config.data.mixture) or config.data.source
        found.append({"data": named(config.sft.source or data), **entry, **known})  # a fine-tuning does not say
    return found


def versions(step: Path) -> dict[str, str]:
    """Versions of the packages that a step was done with."""
    file = step / "step.json"
    record = read_json(file) if file.is_file() else {}
    packages = (record.get("provenance") or {}).get("packages") or {}
    return {name: str(packages[name]) for name in ("torch", "transformers") if name in packages}
