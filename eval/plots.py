"""The figures of a run's report in their order: what each shows, its caption, and whether it can be drawn yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from eval import captions, distance
from eval.drawing import NARROW, WIDE, inline, png, svg_file
from eval.figures import accuracy, cost, importance, pareto, placement, speed, training
from eval.frames import importance_frame, loss_frame, task_frame
from eval.provenance import cost_frame
from eval.runs import Record, Run, Stage, number
from eval.speeds import engines_told, machine, memory_frame, pays_from, prefill_frame, throughput_frame
from eval.words import MINUS, PLUS_MINUS, measured, percent
from eval.words import speed as per_second


@dataclass(frozen=True)
class Plot:
    """A figure of the page: file name, title, caption (HTML), and how to draw it at a width (``None``: not yet)."""

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure] | None

    @property
    def images(self) -> Images | None:
        """The figure drawn for a page, for a phone and for files; None where it cannot be drawn yet."""
        if self.draw is None:
            return None
        wide = self.draw(WIDE)
        drawn = svg_file(wide)
        sizes = {"wide": drawn, "narrow": svg_file(self.draw(NARROW))}
        return Images({size: inline(text, f"{self.name}-{size}") for size, text in sizes.items()}, drawn, png(wide))


@dataclass(frozen=True)
class Images:
    """A figure as images."""

    inline: dict[str, str]
    """``wide`` and ``narrow`` as parts of a page."""
    svg: str
    png: bytes


def plots_of(run: Run, frame: pd.DataFrame) -> list[Plot]:
    """The figures of the page in their order; one whose records are not there yet has no `draw`."""
    placed = [stage for stage in run.stages if stage.records["place"]]
    losses, timed, tuned = loss_frame(run), throughput_frame(run), loss_frame(run, tuned=True)
    tasks, ranked, held, spent = task_frame(run), importance_frame(run), memory_frame(run), cost_frame(run)
    prompts = prefill_frame(run)
    distances = distance.distance_frame(run)

    def plot(name: str, draw: Callable[..., Figure], data: Any, ready: bool, extra: str = "") -> Plot:
        section, caption = captions.CAPTIONS[name]
        return Plot(section, name, "", caption + extra, partial(draw, data) if ready else None)

    def has(data: pd.DataFrame, *columns: str) -> bool:
        return len(data.dropna(subset=list(columns))) > 0

    names = [model.name for model in run.models]
    tuning = partial(training.loss, label="cross-entropy (nats a token)", models=names)
    fine_tuning = plot("tuning", tuning, tuned, has(tuned, "loss") or has(tuned, "eval_loss"), _merged(run))
    compared = ranked.loc[ranked["rank"].notna(), "stage"].nunique() > 1
    reach = escape(distance.told(distances))
    plots = [
        plot("pareto", pareto.pareto, frame, has(frame, "ratio", "generative"), _marks(run, frame) + _uneven(frame)),
        plot("tasks", accuracy.by_task, tasks, has(tasks, "value"), _truncated(tasks)),
        *([plot("distance", distance.by_distance, distances, True, reach)] if len(distances) else []),
        plot("placement", placement.placement, placed, bool(placed)),
        *([plot("ranks", importance.ranks, ranked, True)] if compared else []),
        *(importance_plot(stage) for stage in run.stages),
        plot("loss", training.loss, losses, has(losses, "loss") or has(losses, "eval_loss")),
        *([fine_tuning] if run.tuned else []),
        plot("throughput", speed.throughput, timed, has(timed, "step_seconds"), _rooflines(run)),
        *([plot("prefill", speed.prefill, prompts, True)] if has(prompts, "seconds") else []),
        plot("memory", speed.memory, held, has(held, "bytes")),
    ]
    return [*plots, *([plot("cost", cost.wall_time, spent, True)] if (spent["seconds"] > 0).any() else [])]


FROM = "From the step <code>score</code>."


def _halved(scores: Record) -> str:
    """What halving saved of a score's steps, or would have."""
    found = scores.get("halving") or {}
    if "saved" in found:
        return captions.HALVED.format(saved=measured(100 * number(found, "saved"), "{:.0f}%"))
    if "would_save" in found:
        changed = "changed" if found.get("changes_choice") else "kept"
        return captions.HALVING.format(
            changed=changed, would_save=measured(100 * number(found, "would_save"), "{:.0f}%")
        )
    return ""


def _compared(scores: Record) -> str:
    """How other scores of the same blocks rank them."""
    others = [
        f"{escape(str(each['scorer']))} {measured(number(each, 'spearman'), '{:.2f}').replace('-', MINUS)}"
        for each in scores.get("compared") or []
    ]
    return captions.COMPARED.format(others=", ".join(others)) if others else ""


def importance_plot(stage: Stage) -> Plot:
    """The figure of a stage's scores, or none where it is not scored."""
    scores = stage.records["score"] or {}
    scorer = str(scores.get("scorer", ""))
    told = {key: escape(str(scores.get(key, "?"))) for key in ("metric", "steps", "trainable")}
    caption, draw = FROM, None
    if scorer == "loo":
        model = "the teacher" if stage.index == 1 else "the model that the stage starts from"
        baseline = percent(number(scores, "baseline"), number(scores, "baseline_stderr"))
        caption = (
            captions.LOO.format(model=model, baseline=baseline.replace(PLUS_MINUS, f" {PLUS_MINUS} "), **told) + caption
        )
        draw = partial(importance.loo, stage)
    elif scorer == "mmr":
        caption = captions.MMR.format(correlation=_rank_correlation(scores), **told) + caption
        draw = partial(importance.mmr, stage)
    elif scorer:
        caption = captions.SCORES.get(scorer, f"By the scorer <code>{escape(scorer)}</code>. ").format(**told) + caption
        draw = partial(importance.loo, stage) if scores.get("blocks") else None
    caption = caption.replace(FROM, _halved(scores) + _compared(scores) + FROM)
    title = f"Stage {stage.index}, {stage.name}" + (
        f": {scorer.upper() if scorer in ('loo', 'mmr') else scorer}" if scorer else ""
    )
    return Plot("Importance", f"importance-{stage.index:02d}", title, caption, draw)


def _marks(run: Run, frame: pd.DataFrame) -> str:
    """What stands beside the points, what a square is and what a triangle, where there are any."""
    text = "" if "run" in frame else " Beside each hybrid stand the training tokens spent along its lineage."
    text += " Squares are stages trained further after distillation, in their stage's colour." if run.tuned else ""
    if engines := engines_told(run):
        text += f" Squares named after a type are GGUF files. {escape(engines)}"
    return text + (" Triangles were measured elsewhere." if (frame["stage"] < 0).any() else "")


def _merged(run: Run) -> str:
    """How each fine-tuned model was merged with its stage, and the loss of the result."""
    found = [(model.name, model.records["merge"]) for model in run.tuned]
    return "".join(
        f" {escape(name)}: merged with alpha = {number(merge, 'alpha'):g}, "
        f"held-out loss {measured(number(merge, 'eval_loss'), '{:.4f}')}."
        for name, merge in found
        if merge
    )


def _uneven(frame: pd.DataFrame) -> str:
    """A warning where the teacher's own speed differed between the runs that timed it."""
    speeds = frame["teacher_tokens_per_second"].dropna()
    if len(speeds) < 2 or speeds.max() <= 1.1 * speeds.min():
        return ""
    return (
        f" The teacher's own speed differed between the runs ({per_second(speeds.min())} to {per_second(speeds.max())} "
        "tokens/s); each ratio is to the teacher timed in the same run."
    )


def _rank_correlation(scores: Record) -> str:
    losses = pd.DataFrame(scores["blocks"]).reindex(columns=["loss_start", "loss_end"]).astype(float).dropna()
    rho = losses["loss_start"].rank().corr(losses["loss_end"].rank()) if len(losses) > 2 else math.nan
    return measured(rho, "{:.2f}").replace("-", MINUS)


def _rooflines(run: Run) -> str:
    """Whose roofline the fractions are of, and from which context a mixer pays on it."""
    name, lines = machine(run), pays_from(run)
    text = f" The roofline is that of {escape(name)}." if name else ""
    return text + (f" By it a block decodes faster than with attention: {escape('; '.join(lines))}." if lines else "")


def _truncated(tasks: pd.DataFrame) -> str:
    """How many generations were cut off, where that was counted."""
    known = tasks.dropna(subset=["truncated"])
    if known.empty:
        return ""
    cut = known[known["truncated"] > 0]
    if cut.empty:
        return " No generation was cut off."
    told = ", ".join(f"{row['model']} {row['task']} {row['truncated']:,.0f}" for _, row in cut.iterrows())
    return f" Generations cut off by the length limit: {escape(told)}."
