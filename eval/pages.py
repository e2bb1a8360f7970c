"""The page of one run, and that of several beside each other, put together from figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
import yaml

from eval import captions, page, tables
from eval.plots import Images, Plot
from eval.provenance import commands, cost_frame, provenance_frame
from eval.runs import Run, tasks_of
from eval.speeds import protocol_frame
from eval.summary import missing, protocol
from eval.words import NOT_MEASURED

UNFINISHED = "is not finished, and this report is of what there is. Missing:"


def run_page(
    run: Run,
    frame: pd.DataFrame,
    plots: Sequence[Plot],
    images: Mapping[str, Images],
    lead: str,
    notes: Sequence[str] = (),
    external: pd.DataFrame | None = None,
) -> str:
    """The page of one run as text; ``external`` are the rows of models measured elsewhere, if any."""
    parts, section = [], ""
    for plot in plots:
        if plot.section != section:
            section = plot.section
            parts.append(page.heading(section))
        drawn = images[plot.name].inline if plot.name in images else {}
        parts.append(page.figure(section, plot.title, drawn, plot.caption))
        if plot.name == "pareto":
            parts += _stages(run, frame, external)
        if plot.name == "cost":
            parts.append(_cost(run))
    parts += _provenance([run], [run.name])
    lacks = missing(run)
    asides = [page.aside(f"This run {UNFINISHED}", lacks)] if lacks else []
    asides += [page.aside("Of the models measured elsewhere:", notes)] if notes else []
    return page.document(run.name, lead, asides, parts)


def joint_page(
    runs: Sequence[Run],
    labels: Sequence[str],
    frame: pd.DataFrame,
    joint: Images | None,
    panels: Mapping[tuple[str, str], dict[str, str]],
    lead: str,
    warnings: Sequence[str],
    notes: Sequence[str],
    differences: pd.DataFrame,
) -> str:
    """The page of several runs: one Pareto plot and table, what differs, and every other figure side by side.

    ``panels``: (section, title) of a figure -> the SVG of each run, by its label.
    """
    section, caption = captions.CAPTIONS["pareto"]
    caption += " A colour is a run, a square a stage trained further, a triangle a model measured elsewhere."
    parts = [page.heading(section), page.figure(section, "", joint.inline if joint else {}, caption)]
    told = captions.JOINT.format(protocol=escape(protocol(runs)), file="tables/models.csv")
    parts += [page.heading("Models"), page.table(tables.joint_rows(frame), list(frame["frontier"]), told)]
    parts.append(page.heading("What differs"))
    if len(differences):
        rows = [["key", *labels], *differences.values.tolist()]
        parts.append(page.table(rows, [False] * len(differences), captions.DIFFERENCES, texts=True))
    else:
        parts.append("<p>Nothing in the configs, but where the runs lie and what they are called.</p>")
    section = ""
    for (name, title), drawn in panels.items():
        if name != section:
            section = name
            parts.append(page.heading(section))
        beside = {label: drawn.get(label, "") for label in labels}
        told = next(text for _, text in captions.CAPTIONS.values() if _ == name)
        parts += [f"<h3>{escape(title)}</h3>"] if title else []
        parts.append(page.side_by_side(f"{section}. {title}".strip(), beside, told if not title else ""))
    parts += _provenance(runs, labels)
    asides = [page.aside(line) for line in warnings]
    for run, label in zip(runs, labels, strict=True):
        if lacks := missing(run):
            asides.append(page.aside(f"{label} {UNFINISHED}", lacks))
    asides += [page.aside("Of the models measured elsewhere:", notes)] if notes else []
    return page.document(" and ".join(labels), lead, asides, parts)


def _stages(run: Run, frame: pd.DataFrame, external: pd.DataFrame | None) -> list[str]:
    """The stage table, the models measured elsewhere, and the speeds by protocol."""
    own = frame[frame["stage"] >= 0]
    caption = captions.TABLE.format(protocol=escape(protocol([run])), cache=_at_cache(own))
    parts = [page.heading("Stages"), page.table(tables.table_rows(own, tasks_of(run)), list(own["frontier"]), caption)]
    if external is not None and len(external):
        told = captions.JOINT.format(protocol=escape(protocol([run])), file="tables/external.csv")
        parts += [
            page.heading("Measured elsewhere"),
            page.table(tables.joint_rows(external), list(external["frontier"]), told),
        ]
    protocols = protocol_frame(run)
    if protocols["protocol"].nunique() > 1:  # one alone stands in the stage table
        rows = tables.protocol_rows(protocols)
        parts += [
            page.heading("Throughput by protocol"),
            page.table(rows, [False] * (len(rows) - 1), captions.PROTOCOL),
        ]
    return parts


def _cost(run: Run) -> str:
    rows = tables.cost_rows(cost_frame(run))
    return page.table(rows, [False] * (len(rows) - 1), captions.COST)


def _provenance(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Config, commands, and of every step its fingerprint, when and with what it was done."""
    parts = [page.heading("Provenance")]
    for run, label in zip(runs, labels, strict=True):
        title = f"{label}: " if len(runs) > 1 else ""
        frame = provenance_frame(run)
        parts.append(page.details(f"{title}Commands", "\n".join(commands(run))))
        config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else NOT_MEASURED
        parts.append(page.details(f"{title}Resolved config, run.yaml", config))
        if len(frame):
            shown = [column for column in frame if column not in ("packages", "command") and frame[column].any()]
            rows = [shown, *frame[shown].values.tolist()]
            versions = [text for text in frame["packages"].unique() if text]
            told = f"{len(frame)} finished steps. Packages: {'; and: '.join(versions) or 'not recorded'}."
            inner = page.table(rows, [False] * len(frame), escape(told), texts=True)
            parts.append(
                f"<details><summary>{escape(title)}Steps, fingerprints and versions</summary>{inner}</details>"
            )
    return parts


def _at_cache(frame: pd.DataFrame) -> str:
    """At which batch and context the table's cache bytes were taken."""
    known = frame[["cache_batch", "cache_context"]].dropna().max()
    return "" if known.isna().any() else f" (batch {known.iloc[0]:.0f}, context {known.iloc[1]:,.0f})"
