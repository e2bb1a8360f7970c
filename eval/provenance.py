"""Where a run's figures come from: what each step cost and on what, fingerprints, versions, commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import Any

import pandas as pd

from eval.runs import Record, Run, number

COST = ["model", "step", "tokens", "seconds", "device"]
PROVENANCE = ["model", "step", "fingerprint", "finished", "host", "python", "packages", "command"]


def _steps(run: Run) -> Iterator[tuple[str, str, Record, float]]:
    """Every finished step of a run: model, step, its ``step.json``, the tokens that it trained on (NaN: none)."""
    if run.step:
        yield "teacher", "measure", run.step, math.nan
    for model in run.models:
        for step, record in model.steps.items():
            tokens = number(model.records["train"] or {}, "tokens") if step == "train" else math.nan
            yield model.name, step, record, tokens


def cost_frame(run: Run) -> pd.DataFrame:
    """A row for every finished step: model, step, tokens trained on, seconds of wall time, device.

    Where a training was interrupted its seconds are those of the last session, and the minutes of the log are taken.
    """
    minutes = {model.name: number(model.records["train"] or {}, "minutes") for model in run.models}
    rows = []
    for model, step, record, tokens in _steps(run):
        seconds = number(record, "seconds")
        if step == "train" and minutes[model] > 0:
            seconds = max(seconds, 60 * minutes[model])
        rows.append([model, step, tokens, seconds, str(_provenance(record).get("device", ""))])
    return pd.DataFrame(rows, columns=COST).astype({"tokens": float, "seconds": float})


def provenance_frame(run: Run) -> pd.DataFrame:
    """A row for every finished step: model, step, fingerprint, when, host, versions, command; empty where a record
    of before does not tell."""
    rows = []
    for model, step, record, _ in _steps(run):
        known = _provenance(record)
        packages = known["packages"] if isinstance(known.get("packages"), dict) else {}
        listed = "; ".join(f"{name} {version}" for name, version in packages.items())
        told = [str(known.get(key, "")) for key in ("finished", "host", "python")]
        rows.append([model, step, str(record.get("fingerprint", "")), *told, listed, str(known.get("command", ""))])
    return pd.DataFrame(rows, columns=PROVENANCE)


def commands(run: Run) -> list[str]:
    """The commands that made the run's records, each once in their order; of a run that does not tell, those that
    make it again from its run.yaml."""
    told = list(dict.fromkeys(command for command in provenance_frame(run)["command"] if command))
    if told:
        return told
    target = shlex.quote(str(run.config.get("run_dir") or run.path.name))
    tuned = [f"distill sft {target} --stage {model.index}" for model in run.tuned]
    return [f"distill run {target}", *tuned, f"distill report {target}"]


def teacher_identity(run: Run) -> str:
    """A hash of the teacher's config and weights, as the run's steps noted it; empty where none did."""
    for record in (run.step, *(step for model in run.models for step in model.steps.values())):
        inputs = record.get("inputs")
        if isinstance(inputs, dict) and inputs.get("teacher"):
            return str(inputs["teacher"])
    return ""


def measured_by(run: Run) -> Any:
    """What of the config decides the measures, as the steps noted it (else the config's); None where neither says."""
    for record in (run.step, *(model.steps.get("measure", {}) for model in run.models)):
        inputs = record.get("inputs")
        if isinstance(inputs, dict) and inputs.get("measure"):
            return inputs["measure"]
    return run.config.get("measure")


def _provenance(record: Record) -> dict[str, Any]:
    known = record.get("provenance")
    return known if isinstance(known, dict) else {}
