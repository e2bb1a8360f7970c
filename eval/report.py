"""The report of a run: the stage table, the figures as PNG, a CSV, and one self-contained HTML page.

    distill report RUN

Reads the records of RUN through `eval.pareto` and writes RUN/report/. The page is a pure function of the
records: no clock, no network, no script. An unfinished run gets a report too, which says what is missing.
"""

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

from eval import figures
from eval.figures import NARROW, WIDE, count
from eval.pareto import (
    Record,
    Run,
    Stage,
    best_hybrid,
    loss_frame,
    number,
    read_run,
    stage_frame,
    tasks_of,
    throughput_frame,
)

NOT_MEASURED = "not measured"
TIMES, DASH, MINUS, APOSTROPHE = "\u00d7", "\u2013", "\u2212", "\u2019"
KEEP = 0.95
"""Share of the teacher's mean generative accuracy that a hybrid must keep to be called a success."""

CAPTIONS = {
    "pareto": (
        "Accuracy against throughput",
        "Up and to the right is better. Filled points are on the Pareto frontier (dashed), hollow ones are "
        "dominated. Bars are one standard error of the mean over the generative tasks; beside each hybrid "
        "stand the training tokens spent along its lineage. From the step <code>measure</code> of the "
        "teacher and of every stage.",
    ),
    "placement": (
        "Placement",
        "The mixer of every block after every stage. The number in a cell is the stage that converted the "
        "block, in bold where it is new. From the step <code>place</code>.",
    ),
    "loss": (
        "Training",
        "Distillation loss: each step (thin), its running mean (thick), and the loss on held-out tokens "
        "(rings). Tokens count along the lineage. From the step <code>train</code>.",
    ),
    "decode": (
        "Decode time",
        "Median time of one decode step and its quartiles (band). Teacher and hybrid are timed alternately "
        "in one process; the teacher's line is the median of those runs, its band spans them all. From the "
        "step <code>measure</code>.",
    ),
    "cache": (
        "Cache",
        "Bytes that the decoding cache of the whole batch holds: keys and values of the attention blocks, "
        "states of the others. From the step <code>measure</code>.",
    ),
}
LOO = (
    "Leave-one-out: what the teacher ({metric} {baseline}, in per cent) loses when the whole block becomes "
    "the identity, with one standard error. Blocks are replaced in increasing order. "
)
MMR = (
    "MIL-Mamba-replacement: held-out distillation loss with one more block replaced, before and after "
    "{steps} steps of distillation (trainable: {trainable}). Rank 1 costs least and is replaced first; a "
    "crossing is a change of rank. Each side has a scale of its own. Rank correlation between the sides: "
    "{correlation}. "
)
TABLE = (
    "Accuracies in per cent, ± one standard error; a mean stands where all its tasks were measured. ● is "
    "on the Pareto frontier. Tokens/s: output tokens{protocol}; vs teacher: against the teacher timed in "
    "the same run. Tokens count along the lineage, minutes are those of the stage's own training. From the "
    "steps <code>measure</code> and <code>train</code>; in full precision in stages.csv."
)


@dataclass(frozen=True)
class Plot:
    """A figure of the page: PNG name, caption (HTML), and how to draw it at a width (``None``: not yet)."""

    section: str
    name: str
    title: str
    caption: str
    draw: Callable[[float], Figure] | None


def write_report(run: Path) -> Path:
    """Write RUN/report/ (report.html, stages.csv, one PNG per figure) and return the path of the page."""
    records = read_run(run)
    frame = stage_frame(records)
    plots = plots_of(records, frame)
    folder = run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        if plot.draw:
            (folder / f"{plot.name}.png").write_bytes(figures.png(plot.draw(WIDE)))
    frame.to_csv(folder / "stages.csv", index=False)
    page = folder / "report.html"
    page.write_text(html_page(records, frame, plots), encoding="utf-8")
    return page


def table(run: Path) -> str:
    """The stage table as aligned text for the terminal: accuracy in per cent above, speed and cost below."""
    records = read_run(run)
    rows = table_rows(stage_frame(records), tasks_of(records))
    split = len(rows[0]) - 4
    blocks = [rows, None] if _width(rows) <= 110 else [[r[:split] for r in rows], [[r[0], *r[split:]] for r in rows]]
    return "\n\n".join(_aligned(block) for block in blocks if block)


def table_rows(frame: pd.DataFrame, tasks: dict[str, str]) -> list[list[str]]:
    """The stage table as text: a header, then a row for the teacher and each stage."""
    kinds = {"generative": "mean generative", "multiple_choice": "multiple choice"}
    kinds = {kind: title for kind, title in kinds.items() if kind in tasks.values()}
    header = ["model", *tasks, *kinds.values(), "tokens/s", "vs teacher", "tokens", "minutes"]
    rows = [header]
    for _, row in frame.iterrows():
        teacher = row["stage"] == 0
        rows.append(
            [
                str(row["name"]),
                *(percent(row[key], row[f"{key}_stderr"]) for key in [*tasks, *kinds]),
                speed(row["tokens_per_second"]),
                measured(row["ratio"], "{:.2f}" + TIMES),
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
    minutes = hybrids[hybrids["stage"] <= best["stage"]]["minutes"].sum(skipna=False)
    cost += [f"{minutes:,.1f} minutes of training"] if minutes >= 0 else []
    return text + (f", and took {' and '.join(cost)}." if cost else ".")


def missing(run: Run) -> list[str]:
    """What an unfinished run still lacks, a line each; empty when every record is there."""
    lacks = [] if run.config else ["run.yaml (the resolved config)"]
    lacks += [] if run.teacher else ["the teacher: not measured"]
    distill = run.config.get("distill")
    total = distill.get("steps") if isinstance(distill, dict) else None
    for stage in run.stages:
        absent = [step for step, record in stage.records.items() if record is None]
        if stage.log and "train" in absent:
            reached = f"step {max(int(line.get('step', 0)) for line in stage.log):,}"
            of = f" of {total:,}" if isinstance(total, int) else ""
            absent[absent.index("train")] = f"train (reached {reached}{of})"
        begun = bool(stage.log) or any(stage.records.values())
        if absent:
            what = f"lacks {', '.join(absent)}" if begun else "not started"
            lacks.append(f"stage {stage.index}, {stage.name}: {what}")
    return lacks


def plots_of(run: Run, frame: pd.DataFrame) -> list[Plot]:
    """The figures of the page in their order; one whose records are not there yet has no `draw`."""
    placed = [stage for stage in run.stages if stage.records["place"]]
    losses, decode = loss_frame(run), throughput_frame(run)

    def plot(name: str, draw: Callable[..., Figure], data: Any, ready: bool, extra: str = "") -> Plot:
        section, caption = CAPTIONS[name]
        return Plot(section, name, "", caption + extra, partial(draw, data) if ready else None)

    def has(data: pd.DataFrame, *columns: str) -> bool:
        return len(data.dropna(subset=list(columns))) > 0

    return [
        plot("pareto", figures.pareto, frame, has(frame, "tokens_per_second", "generative"), _uneven(frame)),
        plot("placement", figures.placement, placed, bool(placed)),
        *(importance_plot(stage) for stage in run.stages),
        plot("loss", figures.loss, losses, has(losses, "loss") or has(losses, "eval_loss")),
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
        caption = LOO.format(baseline=baseline, **told) + caption
        draw = partial(figures.loo, stage)
    elif scorer == "mmr":
        caption = MMR.format(correlation=_rank_correlation(scores), **told) + caption
        draw = partial(figures.mmr, stage)
    elif scorer:
        caption = f"The scorer <code>{escape(scorer)}</code> has no figure. " + caption
    title = f"Stage {stage.index}, {stage.name}" + (f": {scorer.upper()}" if scorer else "")
    return Plot("Importance", f"importance-{stage.index:02d}", title, caption, draw)


def html_page(run: Run, frame: pd.DataFrame, plots: list[Plot]) -> str:
    """The whole page as text."""
    name = escape(str(run.config.get("name", run.path.name)))
    lacks = missing(run)
    parts = [f"<h1>{name}</h1>", f'<p class="lead">{escape(summary(run, frame)).replace("&#x27;", APOSTROPHE)}</p>']
    if lacks:
        items = "".join(f"<li>{escape(line)}</li>" for line in lacks)
        parts.append(f"<aside><p>This run is not finished. Missing:</p><ul>{items}</ul></aside>")
    section = ""
    for plot in plots:
        if plot.section != section:
            section = plot.section
            parts.append(f"<h2>{escape(section)}</h2>")
        parts.append(html_figure(plot))
        if plot.name == "pareto":
            parts += ["<h2>Stages</h2>", html_table(run, frame)]
    config = (
        escape(yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)) if run.config else NOT_MEASURED
    )
    parts.append(f"<h2>Config</h2><details><summary>Resolved config, run.yaml</summary><pre>{config}</pre></details>")
    return PAGE.format(title=name, style=CSS, body="\n".join(parts))


def html_figure(plot: Plot) -> str:
    """A figure drawn for a wide page and for a narrow one, of which the page shows one, and its caption."""
    images = f'<p class="missing">{NOT_MEASURED}</p>'
    if plot.draw:
        label = escape(f"{plot.section}. {plot.title}".strip(" ."))
        images = "".join(
            f'<div class="{size}" role="img" aria-label="{label}">'
            f"{figures.svg(plot.draw(width), f'{plot.name}-{size}')}</div>"
            for size, width in (("wide", WIDE), ("narrow", NARROW))
        )
    heading = f"<h3>{escape(plot.title)}</h3>" if plot.title else ""
    caption = plot.caption.replace("'", APOSTROPHE)
    return f"<figure>{heading}{images}<figcaption>{caption}</figcaption></figure>"


def html_table(run: Run, frame: pd.DataFrame) -> str:
    """The stage table; models on the frontier are marked."""
    header, *rows = table_rows(frame, tasks_of(run))
    head = "".join(f'<th scope="col">{escape(cell).replace("_", "_<wbr>")}</th>' for cell in header)
    lines = []
    for row, frontier in zip(rows, frame["frontier"], strict=True):
        mark = ' <span title="on the Pareto frontier">●</span>' if frontier else ""
        cells = "".join(html_cell(cell) for cell in row[1:])
        lines.append(f'<tr><th scope="row">{escape(row[0])}{mark}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    caption = TABLE.format(protocol=escape(_protocol(run))).replace("'", APOSTROPHE)
    return f'<figure><div class="scroll"><table>{body}</table></div><figcaption>{caption}</figcaption></figure>'


def html_cell(text: str) -> str:
    """A table cell: a standard error set smaller, what is not measured set apart."""
    if text == NOT_MEASURED:
        return f'<td class="missing">{text}</td>'
    value, plus_minus, error = escape(text).partition(" ± ")
    return f"<td>{value}<small>{plus_minus}{error}</small></td>" if error else f"<td>{value}</td>"


def measured(value: float, form: str) -> str:
    """`value` in `form`, or that it was not measured."""
    return NOT_MEASURED if math.isnan(value) else form.format(value)


def percent(value: float, stderr: float) -> str:
    """A fraction and its standard error in per cent."""
    return measured(100 * value, "{:.1f}") + (
        "" if math.isnan(value) or math.isnan(stderr) else f" ± {100 * stderr:.1f}"
    )


def speed(value: float) -> str:
    """Tokens per second in about three digits."""
    return measured(value, "{:,.0f}" if value >= 100 else "{:.3g}")


def _kept(row: "pd.Series[Any]", teacher: "pd.Series[Any]") -> str:
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


def _at_speed(row: "pd.Series[Any]") -> str:
    return f" at {speed(row['tokens_per_second'])} tokens/s" if row["tokens_per_second"] > 0 else ""


def _protocol(run: Run) -> str:
    for stage in run.stages:
        headline = (stage.records["measure"] or {}).get("headline") or {}
        if "batch" in headline and "output_tokens" in headline:
            return f" (batch {headline['batch']}, 1 token in, {headline['output_tokens']:,} out)"
    return ""


def _uneven(frame: pd.DataFrame) -> str:
    """A warning where the teacher's own speed differed between the runs that timed it."""
    speeds = frame["teacher_tokens_per_second"].dropna()
    if len(speeds) < 2 or speeds.max() <= 1.1 * speeds.min():
        return ""
    return (
        f" The teacher's own speed differed between the runs ({speed(speeds.min())} to {speed(speeds.max())} "
        "tokens/s), so compare by the ratios in the table."
    )


def _rank_correlation(scores: Record) -> str:
    losses = pd.DataFrame(scores["blocks"]).reindex(columns=["loss_start", "loss_end"]).astype(float).dropna()
    rho = losses["loss_start"].rank().corr(losses["loss_end"].rank()) if len(losses) > 2 else math.nan
    return measured(rho, "{:.2f}").replace("-", MINUS)


def _width(rows: list[list[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

CSS = """
:root { --ink: #1f2431; --muted: #5f6b7c; --grid: #dfe3ea; --paper: #fff; --shade: #f5f6f8; --warn: #a15c00;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e7ed; --muted: #9aa4b4; --grid: #2d333e;
  --paper: #14171c; --shade: #1c2027; --warn: #e0a458; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 64rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.005em; margin: 3.2rem 0 1rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 0 0 .6rem; break-after: avoid; }
.lead { font-size: 1.15rem; max-width: 46rem; margin: 0; }
aside { border-left: 3px solid var(--warn); background: var(--shade); margin: 1.5rem 0 0; padding: .7rem 1rem;
  max-width: 46rem; break-inside: avoid; }
aside p, aside ul { margin: 0; }
figure { margin: 0 0 2.2rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure svg text { font-family: var(--sans) !important; }
figcaption { color: var(--muted); font-size: .875rem; line-height: 1.5; margin-top: .7rem; max-width: 46rem; }
.narrow { display: none; }
.missing { color: var(--muted); font-style: italic; }
td.missing { white-space: normal; line-height: 1.2; min-width: 4.6em; }
p.missing { border: 1px dashed var(--grid); padding: 1.2rem; margin: 0; text-align: center; }
code, pre { font-family: var(--mono); font-size: .9em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 500; line-height: 1.3; vertical-align: bottom; }
thead th { white-space: normal; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
td small { color: var(--muted); font-size: .85em; }
summary { cursor: pointer; }
pre { background: var(--shade); padding: 1rem; overflow-x: auto; line-height: 1.45; }
@media screen and (max-width: 44rem) {
  main { padding: 1.5rem 1rem 3rem; } .wide { display: none; } .narrow { display: block; }
  h1 { font-size: 1.6rem; } h2 { margin-top: 2.4rem; } .lead { font-size: 1.05rem; } }
@media print {
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .25rem; } td, th { white-space: normal; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; } }
@page { margin: 16mm; }
"""
