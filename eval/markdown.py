"""``report.md``: what a report says, for a model card or a pull request."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from eval.provenance import commands, cost_frame, provenance_frame
from eval.runs import Run, tasks_of
from eval.speeds import engines_told, protocol_frame
from eval.tables import cost_rows, protocol_rows, table_rows


def pipes(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first is the header) as a Markdown table, numbers to the right."""
    header, *body = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def image(name: str, alt: str) -> str:
    """A figure of the report, as it lies beside the text."""
    return f"![{alt}](figures/{name}.png)"


def run_markdown(run: Run, frame: pd.DataFrame, lead: str, lacks: Sequence[str], figures: Sequence[str]) -> str:
    """The report of one run as Markdown; ``figures`` are the names of those that were drawn."""
    parts = [f"# {run.name}", lead]
    if lacks:
        parts.append("This run is not finished. Missing:\n\n" + "\n".join(f"- {line}" for line in lacks))
    parts += [image("pareto", "Accuracy against throughput")] if "pareto" in figures else []
    parts += ["## Stages", pipes(table_rows(frame, tasks_of(run)))]
    note = "Accuracy in per cent ± one standard error; tokens count along the lineage."
    parts.append(" ".join(filter(None, (note, engines_told(run)))))
    protocols, cost = protocol_frame(run), cost_frame(run)
    if protocols["protocol"].nunique() > 1:  # one alone stands in the stage table
        parts += ["## Throughput", pipes(protocol_rows(protocols))]
    parts += [image("tasks", "Accuracy by task")] if "tasks" in figures else []
    if len(cost):
        parts += ["## Cost", pipes(cost_rows(cost))]
    parts += ["## How it was made", "```\n" + "\n".join(commands(run)) + "\n```"]
    versions = [text for text in provenance_frame(run)["packages"].unique() if text]
    parts += [f"With {text}." for text in versions]
    return "\n\n".join(parts) + "\n"


def joint_markdown(
    title: str, rows: Sequence[Sequence[str]], lead: str, warnings: Sequence[str], differences: Sequence[Sequence[str]]
) -> str:
    """The report of several runs as Markdown."""
    parts = [f"# {title}", lead, *(f"> {line}" for line in warnings), image("pareto", "Accuracy against throughput")]
    parts += [pipes(rows)]
    if len(differences) > 1:
        parts += ["## What differs", pipes(differences)]
    return "\n\n".join(parts) + "\n"
