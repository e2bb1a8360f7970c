"""The report of a run: the stage table, the figures as PNG, a CSV, and one self-contained HTML page.

    distill report RUN

Reads the records of RUN through `eval.pareto` and writes RUN/report/. The page is a pure function of the
records: no clock, no network, no script. An unfinished run gets a report too, which says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from distill.errors import UserError
from distill.records import write_text
from eval import distance, figures, page
from eval.drawing import BYTES, NARROW, WIDE, count, fitting_unit, png, stage_of, svg
from eval.page import NOT_MEASURED, PLUS_MINUS
from eval.pareto import (
    Record,
    Run,
    Stage,
    best_hybrid,
    lineage_of,
    loss_frame,
    number,
    read_run,
    stage_frame,
    tasks_of,
    throughput_frame,
)

TIMES, DASH, MINUS = "\u00d7", "\u2013", "\u2212"
TERMINAL = 100
"""Columns of a terminal that the table may fill before it is cut in two."""
KEEP = 0.95
"""Share of the teacher's mean generative accuracy that a hybrid must keep to be called a success."""


@dataclass(frozen=True)
class Plot:
    """A figure of the page: PNG name, caption (HTML), and how to draw it at a width (``None``: not yet)."""

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure] | None


def write_report(run: Path) -> Path:
    """Write RUN/report/ (report.html, stages.csv, by_distance.csv where that was measured, one PNG per figure) and
    return the path of the page.

    Raises UserError where RUN is no run folder, has broken records or cannot be written to.
    """
    records = read_run(run)
    frame = stage_frame(records)
    plots = plots_of(records, frame)
    images = {f"{plot.name}.png": png(plot.draw(WIDE)) for plot in plots if plot.draw}
    texts = {"stages.csv": frame.to_csv(index=False), "report.html": html_page(records, frame, plots)}
    distances = distance.distance_frame(records)
    if len(distances):
        texts["by_distance.csv"] = distances.to_csv(index=False)
    folder = run / "report"
    try:
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            (folder / name).write_bytes(image)
        for name, text in texts.items():
            write_text(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return folder / "report.html"


def table(run: Path) -> str:
    """The stage table for the terminal; where that is too narrow, the tasks above, means, speed and cost below."""
    records = read_run(run)
    tasks = tasks_of(records)
    rows = table_rows(stage_frame(records), tasks)
    whole, split = page.aligned(rows), 1 + len(tasks)
    if max(map(len, whole.splitlines())) <= TERMINAL:
        return whole
    accuracy, cost = [row[:split] for row in rows], [[row[0], *row[split:]] for row in rows]
    return f"{page.aligned(accuracy)}\n\n{page.aligned(cost)}"


def table_rows(frame: pd.DataFrame, tasks: dict[str, str]) -> list[list[str]]:
    """The stage table as text: a header, then a row for the teacher and each stage, trained further or not.

    A kind with one task only has no mean beside it.
    """
    kinds = {"generative": "mean generative", "multiple_choice": "mean choice"}
    kinds = {kind: title for kind, title in kinds.items() if list(tasks.values()).count(kind) > 1}
    scale, unit = fitting_unit((frame["kv_bytes"] + frame["state_bytes"]).max(), BYTES)
    cache = f"KV + state {unit}"
    header = ["model", *tasks, *kinds.values(), "tokens/s", "vs teacher", cache, "tokens", "min"]
    rows = [header]
    for _, row in frame.iterrows():
        teacher = row["stage"] == 0
        rows.append(
            [
                str(row["name"]),
                *(percent(row[key], row[f"{key}_stderr"]) for key in [*tasks, *kinds]),
                speed(row["tokens_per_second"]),
                measured(row["ratio"], "{:.2f}" + TIMES),
                measured(row["state_bytes"] / scale, f"{row['kv_bytes'] / scale:.1f} + {{:.1f}}"),
                DASH if teacher else count(row["tokens"]) if row["tokens"] >= 0 else NOT_MEASURED,
                DASH if teacher else measured(row["minutes"], "{:,.1f}"),
            ]
        )
    return rows


def summary(run: Run, frame: pd.DataFrame) -> str:
    """What the run found, in plain words computed from its figures."""
    teacher, hybrids = frame.iloc[0], frame[frame["stage"] > 0]
    done = hybrids[hybrids["generative"].notna()]
    if math.isnan(teacher["generative"]):
        return "The teacher's generative accuracy has not been measured: nothing to compare hybrids with yet."
    base = f"{100 * teacher['generative']:.1f}%"
    if done.empty:
        return (
            f"Only the teacher has been measured: {base} mean generative accuracy"
            f"{_at_speed(teacher)}. No hybrid has been measured yet."
        )
    best = best_hybrid(frame, KEEP)
    if best is None:
        near = done.sort_values("generative").iloc[-1]
        if near["generative"] >= KEEP * teacher["generative"]:
            return f"{near['name']} keeps {_kept(near, teacher)}; no speed has been measured beside the teacher's yet."
        return (
            f"No hybrid keeps {KEEP:.0%} of the teacher's mean generative accuracy ({base}). "
            f"The nearest is {near['name']}, which keeps {_kept(near, teacher)}{_gain(near['ratio'])}."
        )
    text = (
        f"{best['name']} keeps {_kept(best, teacher)}{_gain(best['ratio'])}"
        f"{_protocol(run)}. It is the fastest hybrid that keeps at least {KEEP:.0%} of the teacher's accuracy"
    )
    cost = [f"{count(best['tokens'])} training tokens"] if best["tokens"] >= 0 else []
    chosen = next(stage for stage in run.stages if stage.index == best["stage"])
    spent = hybrids[hybrids["name"] == hybrids["name"].map(stage_of)].set_index("stage")["minutes"]
    minutes = sum(share * spent[stage.index] for stage, share in lineage_of(run.stages, chosen))
    if best["name"] != stage_of(best["name"]):
        minutes += best["minutes"]
    cost += [f"{minutes:,.1f} minutes of training"] if minutes >= 0 else []
    return text + (f", and took {' and '.join(cost)}." if cost else ".")


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


def plots_of(run: Run, frame: pd.DataFrame) -> list[Plot]:
    """The figures of the page in their order; one whose records are not there yet has no `draw`."""
    placed = [stage for stage in run.stages if stage.records["place"]]
    losses, decode, tuned = loss_frame(run), throughput_frame(run), loss_frame(run, tuned=True)
    distances, notes = distance.distance_frame(run), _squares(run) + _uneven(frame)
    reach = escape(distance.told(distances))

    def plot(name: str, draw: Callable[..., Figure], data: Any, ready: bool, extra: str = "") -> Plot:
        section, caption = page.CAPTIONS[name]
        return Plot(section, name, "", caption + extra, partial(draw, data) if ready else None)

    def has(data: pd.DataFrame, *columns: str) -> bool:
        return len(data.dropna(subset=list(columns))) > 0

    names = [model.name for model in run.models]
    tuning = partial(figures.loss, label="cross-entropy (nats a token)", models=names)
    fine_tuning = plot("tuning", tuning, tuned, has(tuned, "loss") or has(tuned, "eval_loss"), _merged(run))
    return [
        plot("pareto", figures.pareto, frame, has(frame, "ratio", "generative"), notes),
        *([plot("distance", distance.by_distance, distances, True, reach)] if len(distances) else []),
        plot("placement", figures.placement, placed, bool(placed)),
        *(importance_plot(stage) for stage in run.stages),
        plot("loss", figures.loss, losses, has(losses, "loss") or has(losses, "eval_loss")),
        *([fine_tuning] if run.tuned else []),
        plot("decode", figures.decode_time, decode, has(decode, "step_seconds")),
        plot("cache", figures.cache, decode, has(decode, "cache_bytes")),
    ]


def importance_plot(stage: Stage) -> Plot:
    """The figure of a stage's scores, or none where it is not scored or the scorer has no figure."""
    scores = stage.records["score"] or {}
    scorer = str(scores.get("scorer", ""))
    told = {key: escape(str(scores.get(key, "?"))) for key in ("metric", "steps", "trainable")}
    caption, draw = "From the step <code>score</code>.", None
    if scorer == "loo":
        baseline = percent(number(scores, "baseline"), number(scores, "baseline_stderr"))
        caption = page.LOO.format(baseline=baseline.replace(PLUS_MINUS, f" {PLUS_MINUS} "), **told) + caption
        draw = partial(figures.loo, stage)
    elif scorer == "mmr":
        caption = page.MMR.format(correlation=_rank_correlation(scores), **told) + caption
        draw = partial(figures.mmr, stage)
    elif scorer:
        caption = f"The scorer <code>{escape(scorer)}</code> has no figure. " + caption
    title = f"Stage {stage.index}, {stage.name}" + (f": {scorer.upper()}" if scorer else "")
    return Plot("Importance", f"importance-{stage.index:02d}", title, caption, draw)


def html_page(run: Run, frame: pd.DataFrame, plots: list[Plot]) -> str:
    """The whole page as text."""
    parts, section = [], ""
    for plot in plots:
        if plot.section != section:
            section = plot.section
            parts.append(page.heading(section))
        draw, sizes = plot.draw, {"wide": WIDE, "narrow": NARROW}
        images = {size: svg(draw(width), f"{plot.name}-{size}") for size, width in sizes.items()} if draw else {}
        parts.append(page.figure(section, plot.title, images, plot.caption))
        if plot.name == "pareto":
            caption = page.TABLE.format(protocol=escape(_protocol(run)), cache=_at_cache(frame))
            rows = table_rows(frame, tasks_of(run))
            parts += [page.heading("Stages"), page.table(rows, list(frame["frontier"]), caption)]
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else NOT_MEASURED
    return page.document(str(run.config.get("name", run.path.name)), summary(run, frame), missing(run), parts, config)


def measured(value: float, form: str) -> str:
    """`value` in `form`, or that it was not measured."""
    return NOT_MEASURED if math.isnan(value) else form.format(value)


def percent(value: float, stderr: float) -> str:
    """A fraction and its standard error in per cent."""
    error = "" if math.isnan(value) or math.isnan(stderr) else f"{PLUS_MINUS}{100 * stderr:.1f}"
    return measured(100 * value, "{:.1f}") + error


def speed(value: float) -> str:
    """Tokens per second in about three digits."""
    return measured(value, "{:,.0f}" if value >= 100 else "{:.3g}")


def _kept(row: pd.Series[Any], teacher: pd.Series[Any]) -> str:
    share = row["generative"] / teacher["generative"] if teacher["generative"] > 0 else math.nan
    blocks = f" with {row['replaced']:.0f} of {row['num_blocks']:.0f} blocks replaced" if row["num_blocks"] > 0 else ""
    return (
        f"{share:.1%} of the teacher's mean generative accuracy ({100 * row['generative']:.1f}% "
        f"against {100 * teacher['generative']:.1f}%){blocks}"
    )


def _gain(ratio: float) -> str:
    if math.isnan(ratio):
        return "; its speed has not been measured"
    if abs(ratio - 1) < 0.005:
        return " and decodes as fast as the teacher"
    return f" and decodes {ratio:.2f}{TIMES} as fast as the teacher" + (", that is, slower" if ratio < 1 else "")


def _at_speed(row: pd.Series[Any]) -> str:
    return f" at {speed(row['tokens_per_second'])} tokens/s" if row["tokens_per_second"] > 0 else ""


def _protocol(run: Run) -> str:
    for stage in run.stages:
        headline = (stage.records["measure"] or {}).get("headline") or {}
        if "batch" in headline and "output_tokens" in headline:
            return f" (batch {headline['batch']}, 1 token in, {headline['output_tokens']:,} out)"
    return ""


def _at_cache(frame: pd.DataFrame) -> str:
    """At which batch and context the table's cache bytes were taken."""
    known = frame[["cache_batch", "cache_context"]].dropna().max()
    return "" if known.isna().any() else f" (batch {known.iloc[0]:.0f}, context {known.iloc[1]:,.0f})"


def _squares(run: Run) -> str:
    """What a square is, where there are any."""
    return " Squares are stages trained further after distillation, in their stage's colour." if run.tuned else ""


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
        f" The teacher's own speed differed between the runs ({speed(speeds.min())} to {speed(speeds.max())} "
        "tokens/s); each ratio is to the teacher timed in the same run."
    )


def _rank_correlation(scores: Record) -> str:
    losses = pd.DataFrame(scores["blocks"]).reindex(columns=["loss_start", "loss_end"]).astype(float).dropna()
    rho = losses["loss_start"].rank().corr(losses["loss_end"].rank()) if len(losses) > 2 else math.nan
    return measured(rho, "{:.2f}").replace("-", MINUS)


def _planned_steps(run: Run, stage: Stage) -> int:
    """The training steps that the config plans for a stage; 0 where it does not say."""
    train = run.config.get(stage.tuning.lower() or "train")
    train = train if isinstance(train, dict) else {}
    each = train.get("steps_by_stage") or []
    steps = each[stage.index - 1] if len(each) >= stage.index else train.get("steps")
    return steps if isinstance(steps, int) else 0
