"""The page of a report: HTML and CSS, made of text and drawn figures by pure functions; and a table as plain text.

One self-contained file: no clock, no network, no script. Text is escaped here; captions are HTML already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

NOT_MEASURED = "not measured"
PLUS_MINUS, APOSTROPHE = "±", "\u2019"


def document(title: str, lead: str, lacks: Sequence[str], parts: Sequence[str], config: str) -> str:
    """The whole page: what was found, what is missing, the `parts` (HTML) in their order, the config."""
    lead = escape(lead, quote=False).replace("'", APOSTROPHE)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{lead}</p>']
    if lacks:
        items = "".join(f"<li>{escape(line)}</li>" for line in lacks)
        body.append(f"<aside><p>This run is not finished. Missing:</p><ul>{items}</ul></aside>")
    body += [*parts, heading("Config")]
    body.append(f"<details><summary>Resolved config, run.yaml</summary><pre>{escape(config)}</pre></details>")
    return PAGE.format(title=escape(title), style=CSS, body="\n".join(body))


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def figure(section: str, title: str, images: Mapping[str, str], caption: str) -> str:
    """A figure as `images` (SVG), of which the page shows the one that fits: ``wide`` or ``narrow``."""
    label = escape(f"{section}. {title}".strip(" ."))
    drawn = "".join(f'<div class="{size}" role="img" aria-label="{label}">{svg}</div>' for size, svg in images.items())
    above = f"<h3>{escape(title)}</h3>" if title else ""
    return _figure(above + (drawn or f'<p class="missing">{NOT_MEASURED}</p>'), caption)


def table(rows: Sequence[Sequence[str]], frontier: Sequence[bool], caption: str) -> str:
    """A table with a header row; rows on the frontier are marked."""
    header, *models = rows
    head = "".join(f'<th scope="col">{escape(cell).replace("_", "_<wbr>")}</th>' for cell in header)
    lines = []
    for row, best in zip(models, frontier, strict=True):
        mark = ' <span title="on the Pareto frontier">●</span>' if best else ""
        lines.append(f'<tr><th scope="row">{escape(row[0])}{mark}</th>{"".join(map(_cell, row[1:]))}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return _figure(f'<div class="scroll"><table>{body}</table></div>', caption)


def aligned(rows: list[list[str]]) -> str:
    """`rows` as text in columns, the header broken at spaces and underscores where its words are long."""
    header, *body = rows
    room = [max([len(row[i]) for row in body]) for i in range(len(header))]
    words = [_broken(title, width) for title, width in zip(header, room, strict=True)]
    depth = max(map(len, words))
    above = [[""] * (depth - len(lines)) + lines for lines in words]
    head = [list(line) for line in zip(*above, strict=True)]
    widths = [max(map(len, column)) for column in zip(*head, *body, strict=True)]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([*map(line, head), "  ".join("-" * width for width in widths), *map(line, body)])


def _broken(title: str, width: int) -> list[str]:
    """`title` in lines of at most `width` characters where its words allow that."""
    lines: list[str] = []
    for word in title.replace("_", "_ ").split(" "):
        joined = lines[-1] + ("" if lines[-1].endswith("_") else " ") + word if lines else ""
        if joined and len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _cell(text: str) -> str:
    """A table cell: a standard error on a line of its own, what is not measured set apart."""
    if text == NOT_MEASURED:
        return f'<td class="missing">{text}</td>'
    value, _, error = escape(text).partition(PLUS_MINUS)
    return f"<td>{value}<small>{PLUS_MINUS} {error}</small></td>" if error else f"<td>{value}</td>"


def _figure(body: str, caption: str) -> str:
    caption = caption.replace("'", APOSTROPHE)
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


CAPTIONS = {
    "pareto": (
        "Accuracy against throughput",
        "Up and to the right is better. Filled points are on the Pareto frontier (dashed), hollow ones are "
        "dominated. Bars are one standard error of the mean over the generative tasks; beside each hybrid "
        "stand the training tokens spent along its lineage. From the step <code>measure</code> of the "
        "teacher and of every stage.",
    ),
    "distance": (
        "Accuracy by distance",
        "Per cent of the answers that are right, by how far they must reach. The shade deepens with what is wrong; "
        "bold stands apart from the teacher (95% Wilson intervals that do not meet), any other difference may be "
        "chance. From the step <code>measure</code>; with the intervals in by_distance.csv.",
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
    "tuning": (
        "Fine-tuning",
        "Cross-entropy on the traces' own targets: each step (thin), its running mean (thick), and the loss on "
        "held-out tokens before and after (rings). The model is then merged with its stage, alpha * fine-tuned + "
        "(1 - alpha) * stage, and it is the merged one that is measured. From the step <code>sft</code>.",
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
    "the same run. KV + state: keys and values + states of the other mixers in the cache of the whole batch"
    "{cache}. Tokens count along the lineage; min: minutes of the row's own training. From the steps "
    " <code>measure</code> and <code>train</code>; in full precision in stages.csv."
)

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
td.missing { white-space: normal; line-height: 1.2; }
p.missing { border: 1px dashed var(--grid); padding: 1.2rem; margin: 0; text-align: center; }
code, pre { font-family: var(--mono); font-size: .9em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .4rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 500; line-height: 1.3; vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
td small { display: block; color: var(--muted); font-size: .85em; line-height: 1.2; }
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
