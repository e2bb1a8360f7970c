"""The report of a run, or of several beside each other: one self-contained page, figures, tables, Markdown.

    distill report RUN [RUN ...]

Everything is a pure function of the records: no clock, no network. An unfinished run gets a report too, which says
what is missing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd

from distill.errors import UserError
from distill.records import write_text
from eval import captions, compare, tables
from eval.drawing import EXTERNAL, NARROW, inline, png, svg_file
from eval.external import read_external
from eval.figures.pareto import pareto
from eval.markdown import joint_markdown, run_markdown
from eval.pages import joint_page, run_page
from eval.pareto import KEEP
from eval.plots import Images, Plot, plots_of
from eval.runs import Run, read_run
from eval.summary import missing, protocol, summary, verdict

OURS = (".png", ".svg", ".csv", ".parquet")
"""What a report writes into its folders ``figures`` and ``tables``, and takes from them when it is written again."""


@dataclass
class Report:
    """What is to be written, by path within the report's folder."""

    texts: dict[str, str] = field(default_factory=dict)
    binaries: dict[str, bytes] = field(default_factory=dict)

    def add_figure(self, name: str, images: Images) -> None:
        """PNG and SVG of a figure."""
        self.binaries[f"figures/{name}.png"], self.texts[f"figures/{name}.svg"] = images.png, images.svg

    def add_table(self, name: str, table: pd.DataFrame) -> None:
        """CSV and Parquet of a table."""
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        self.texts[f"tables/{name}.csv"] = table.to_csv(index=False)
        self.binaries[f"tables/{name}.parquet"] = buffer.getvalue()

    def write(self, folder: Path, *, clear: bool) -> Path:
        """Write everything under `folder`; returns the path of the page, which is written last.

        With `clear` what an earlier report left in its folders ``figures`` and ``tables`` is taken away: only where
        the folder is ours. Raises UserError where that cannot be.
        """
        try:
            for part in ("figures", "tables"):
                (folder / part).mkdir(parents=True, exist_ok=True)
                for old in (folder / part).iterdir() if clear else []:
                    if old.suffix in OURS:
                        old.unlink()
            for name, content in self.binaries.items():
                (folder / name).write_bytes(content)
            for name, text in self.texts.items():
                write_text(folder / name, text)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        return folder / "report.html"


def write_report(*paths: Path, keep: float = KEEP, external: Path | None = None, output: Path | None = None) -> Path:
    """Write the report of the run folders `paths` and return the path of the page.

    One run: into RUN/report. Several: into RUN/report/with-OTHER of the first. `keep` is the share of the teacher's
    accuracy that the hybrid to ship must keep, `external` a CSV of models measured elsewhere.

    Raises UserError where one is no run folder, has broken records or a report cannot be written.
    """
    runs = [read_run(path) for path in paths]
    labels = compare.read_labels(runs)
    others, notes = read_external(external) if external else (None, [])
    frame = compare.joint_frame(runs, labels, others)
    if len(runs) > 1:
        report = joint_report(runs, labels, frame, keep, notes)
        return report.write(output or compare.comparison_folder(runs), clear=output is None)
    return run_report(runs[0], frame, keep, notes).write(output or paths[0] / "report", clear=output is None)


def run_report(run: Run, frame: pd.DataFrame, keep: float = KEEP, notes: Sequence[str] = ()) -> Report:
    """The report of one run; `frame` is `stage_frame`'s, or a joint one with models measured elsewhere."""
    elsewhere = frame[frame["stage"] < 0]
    own = frame[frame["stage"] >= 0].drop(columns=["run", "short"], errors="ignore")
    plots = plots_of(run, frame if len(elsewhere) else own)
    images = {plot.name: drawn for plot in plots if (drawn := plot.images)}
    lead, report = summary(run, own, keep), Report()
    for name, drawn in images.items():
        report.add_figure(name, drawn)
    for name, table in tables.tables_of(run, own).items():
        report.add_table(name, table)
    if len(elsewhere):
        report.add_table("external", elsewhere)
    report.texts["report.md"] = run_markdown(run, own, lead, missing(run), list(images))
    report.texts["report.html"] = run_page(run, frame, plots, images, lead, notes, elsewhere)
    return report


def joint_report(
    runs: Sequence[Run], labels: Sequence[str], frame: pd.DataFrame, keep: float = KEEP, notes: Sequence[str] = ()
) -> Report:
    """The report of several runs beside each other."""
    report, warnings = Report(), compare.cautions(runs, labels)
    ready = len(frame.dropna(subset=["ratio", "generative"])) > 0
    section, caption = captions.CAPTIONS["pareto"]
    joint = Plot(section, "pareto", "", caption, partial(pareto, frame) if ready else None).images
    if joint:
        report.add_figure("pareto", joint)
    panels: dict[tuple[str, str], dict[str, str]] = {}
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        own = frame[frame["run"] == label].assign(name=lambda rows: rows["short"])
        for plot in plots_of(run, own):
            if plot.name == "pareto" or plot.draw is None:
                continue
            drawn = plot.draw(NARROW)
            images = Images({}, svg_file(drawn), png(drawn))
            slug = re.sub(r"[^\w.-]", "-", label)
            report.add_figure(f"{slug}-{plot.name}", images)
            title = re.sub(r",.*", "", plot.title)
            panels.setdefault((plot.section, title), {})[label] = inline(images.svg, f"{number}-{plot.name}")
    differences = compare.difference_frame(runs, labels)
    report.add_table("models", frame)
    if len(differences):
        report.add_table("differences", differences)
    lead = joint_lead(runs, labels, frame, keep)
    rows, differing = tables.joint_rows(frame), [list(differences), *differences.values.tolist()]
    report.texts["report.md"] = joint_markdown(" and ".join(labels), rows, lead, warnings, differing)
    report.texts["report.html"] = joint_page(
        runs, labels, frame, joint, panels, lead, warnings, notes, differences
    )  # fmt: skip
    return report


def joint_lead(runs: Sequence[Run], labels: Sequence[str], frame: pd.DataFrame, keep: float) -> str:
    """Which hybrid of all runs to ship; of runs of different teachers, run by run."""
    if not compare.other_teachers(runs, labels):
        return verdict(frame[frame["run"] != EXTERNAL], keep, protocol(runs))
    return " ".join(f"{label}: {verdict(frame[frame['run'] == label], keep)}" for label in labels)


def table(*paths: Path) -> str:
    """The stage table of a run for the terminal, or that of several."""
    runs = [read_run(path) for path in paths]
    if len(runs) == 1:
        return tables.table(runs[0])
    return tables.aligned(tables.joint_rows(compare.joint_frame(runs, compare.read_labels(runs))))
