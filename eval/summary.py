"""What a run found, in plain words computed from its figures, and what it still lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from eval.drawing import count, stage_of
from eval.pareto import KEEP, best_hybrid
from eval.runs import Run, Stage, lineage_of
from eval.words import TIMES, speed


def summary(run: Run, frame: pd.DataFrame, keep: float = KEEP) -> str:
    """Which hybrid of a run to ship if `keep` of the teacher's accuracy must stay, what it gains and what it cost."""
    best = best_hybrid(frame, keep)
    text = verdict(frame, keep, protocol([run]))
    if best is None:
        return text
    hybrids = frame[frame["stage"] > 0]
    cost = [f"{count(best['tokens'])} training tokens"] if best["tokens"] >= 0 else []
    chosen = next(stage for stage in run.stages if stage.index == best["stage"])
    spent = hybrids[hybrids["name"] == hybrids["name"].map(stage_of)].set_index("stage")["minutes"]
    minutes = sum(share * spent[stage.index] for stage, share in lineage_of(run.stages, chosen))
    if best["name"] != stage_of(best["name"]):
        minutes += best["minutes"]
    cost += [f"{minutes:,.1f} minutes of training"] if minutes >= 0 else []
    return text + (f" It took {' and '.join(cost)}." if cost else "")


def verdict(frame: pd.DataFrame, keep: float = KEEP, how: str = "") -> str:
    """The hybrid to ship out of a stage frame or a joint one, and what it gains; or why there is none yet."""
    teacher, hybrids = frame.iloc[0], frame[frame["stage"] > 0]
    done = hybrids[hybrids["generative"].notna()]
    if math.isnan(teacher["generative"]):
        return "The teacher's generative accuracy has not been measured: nothing to compare hybrids with yet."
    if teacher["generative"] == 0:
        return "The teacher answers no generative question right: its accuracy says nothing about which hybrid to ship."
    base = f"{100 * teacher['generative']:.1f}%"
    if done.empty:
        return (
            f"Only the teacher has been measured: {base} mean generative accuracy"
            f"{_at_speed(teacher)}. No hybrid has been measured yet."
        )
    best = best_hybrid(frame, keep)
    if best is None:
        near = done.sort_values("generative").iloc[-1]
        if near["generative"] >= keep * teacher["generative"]:
            return f"{near['name']} keeps {_kept(near, teacher)}; no speed has been measured beside the teacher's yet."
        return (
            f"No hybrid keeps {100 * keep:g}% of the teacher's mean generative accuracy ({base}): ship none under this "
            f"budget. The nearest is {near['name']}, which keeps {_kept(near, teacher)}{_gain(near['ratio'])}."
        )
    found = f"it keeps {_kept(best, teacher)}{_gain(best['ratio'])}{how}{_cache(best, teacher)}. "
    text = (
        f"Ship {best['name']}: {found}It is the fastest hybrid that keeps at least {100 * keep:g}% of the teacher's "
        "accuracy."
        if best["ratio"] > 1
        else f"Ship none for its speed: of the hybrids that keep at least {100 * keep:g}% of the teacher's accuracy "
        f"none is faster than the teacher. The fastest is {best['name']}: {found}".rstrip()
    )
    floor = keep * teacher["generative"]
    if best["generative"] - best["generative_stderr"] < floor:
        text += " That is within one standard error of the budget: more questions would settle it."
    return text


def protocol(runs: Sequence[Run]) -> str:
    """At which batch and length the speeds of the Pareto plot were taken, in brackets; empty where that differs or
    is not known."""
    headlines = [(model.records["measure"] or {}).get("headline") or {} for run in runs for model in run.models]
    shapes = {(h.get("batch"), h.get("output_tokens")) for h in headlines if h}
    batch, tokens = shapes.pop() if len(shapes) == 1 else (None, None)
    if batch is None or tokens is None:
        return ""
    return f" (batch {batch}, 1 token in, {tokens:,} out)"


def missing(run: Run) -> list[str]:
    """What an unfinished run still lacks, a line each; empty when every record is there."""
    lacks = [] if run.config else ["run.yaml (the resolved config)"]
    lacks += [] if run.teacher else ["the teacher: not measured"]
    for stage in run.models:
        absent = [step for step, record in stage.records.items() if record is None]
        if stage.log and "train" in absent:
            reached = f"step {max(int(line.get('step', 0)) for line in stage.log):,}"
            total = _planned_steps(run, stage)
            of = f" of {total:,}" if total else ""
            absent[absent.index("train")] = f"train (reached {reached}{of})"
        begun = bool(stage.log) or any(stage.records.values())
        if absent:
            what = f"lacks {', '.join(absent)}" if begun else "not started"
            lacks.append(f"{'' if stage.tuning else f'stage {stage.index}, '}{stage.name}: {what}")
    return lacks


def _kept(row: pd.Series[Any], teacher: pd.Series[Any]) -> str:
    share = row["generative"] / teacher["generative"] if teacher["generative"] > 0 else math.nan
    blocks = f" with {row['replaced']:.0f} of {row['num_blocks']:.0f} blocks replaced" if row["num_blocks"] > 0 else ""
    error = f" ± {100 * row['generative_stderr']:.1f}" if row["generative_stderr"] >= 0 else ""
    return (
        f"{share:.1%} of the teacher's mean generative accuracy ({100 * row['generative']:.1f}{error}% "
        f"against {100 * teacher['generative']:.1f}%){blocks}"
    )


def _gain(ratio: float) -> str:
    if math.isnan(ratio):
        return "; its speed has not been measured"
    if abs(ratio - 1) < 0.005:
        return " and decodes as fast as the teacher"
    return f" and decodes {ratio:.2f}{TIMES} as fast as the teacher" + (", that is, slower" if ratio < 1 else "")


def _cache(row: pd.Series[Any], teacher: pd.Series[Any]) -> str:
    """How much of the teacher's cache the model needs; empty where that was not measured."""
    mine, whole = row["kv_bytes"] + row["state_bytes"], teacher["kv_bytes"] + teacher["state_bytes"]
    same = row["cache_batch"] == teacher["cache_batch"] and row["cache_context"] == teacher["cache_context"]
    if not (same and whole > 0 and mine >= 0):
        return ""
    return f", with {mine / whole:.0%} of its cache at context {row['cache_context']:,.0f}"


def _at_speed(row: pd.Series[Any]) -> str:
    return f" at {speed(row['tokens_per_second'])} tokens/s" if row["tokens_per_second"] > 0 else ""


def _planned_steps(run: Run, stage: Stage) -> int:
    """The training steps that the config plans for a stage; 0 where it does not say."""
    train = run.config.get(stage.tuning.lower() or "train")
    train = train if isinstance(train, dict) else {}
    each = train.get("steps_by_stage") or []
    steps = each[stage.index - 1] if len(each) >= stage.index else train.get("steps")
    return steps if isinstance(steps, int) else 0
