"""The page of a report: one self-contained HTML file made of text and drawn figures by pure functions.

No clock and no network. What stands in ``assets/`` goes into it: the style, and a few lines of script that show a
figure's values on hover; without the script they are tooltips. Text is escaped here; captions are HTML already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from eval.words import NOT_MEASURED, PLUS_MINUS

APOSTROPHE = "\u2019"
UNFINISHED = "This run is not finished: the report is of what is there. Missing:"


def asset(name: str) -> str:
    """A file of ``assets/`` as text."""
    return Path(str(resources.files("eval") / "assets" / name)).read_text(encoding="utf-8")


def document(title: str, lead: str, asides: Sequence[str], parts: Sequence[str]) -> str:
    """The whole page: what was found, what is to be said first, the `parts` (HTML) in their order."""
    lead = escape(lead, quote=False).replace("'", APOSTROPHE)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{lead}</p>', *asides, *parts]
    return PAGE.format(title=escape(title), style=asset("page.css"), script=asset("page.js"), body="\n".join(body))


def aside(text: str, items: Sequence[str] = ()) -> str:
    """A box for what must not be overlooked."""
    listed = f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""
    return f"<aside><p>{escape(text, quote=False).replace(chr(39), APOSTROPHE)}</p>{listed}</aside>"


def heading(text: str) -> str:
    """The heading of a section, with an anchor."""
    anchor = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'


def figure(section: str, title: str, images: Mapping[str, str], caption: str) -> str:
    """A figure as `images` (SVG), of which the page shows the one that fits: ``wide`` or ``narrow``."""
    above = f"<h3>{escape(title)}</h3>" if title else ""
    return _figure(above + _drawn(f"{section}. {title}", images), caption)


def side_by_side(section: str, panels: Mapping[str, str], caption: str) -> str:
    """Figures of several runs beside each other, under each other on a phone: a run's name and its SVG (or empty)."""
    cells = [
        f"<div><h3>{escape(run)}</h3>{_drawn(f'{section}. {run}', {'any': svg} if svg else {})}</div>"
        for run, svg in panels.items()
    ]
    return _figure(f'<div class="beside">{"".join(cells)}</div>', caption)


def table(rows: Sequence[Sequence[str]], marked: Sequence[bool], caption: str, *, texts: bool = False) -> str:
    """A table with a header row; `marked` rows are on the frontier. Cells are numbers, or (`texts`) words."""
    header, *models = rows
    head = "".join(f'<th scope="col">{breakable(cell)}</th>' for cell in header)
    lines = []
    for row, best in zip(models, marked, strict=True):
        mark = ' <span title="on the Pareto frontier">●</span>' if best else ""
        first = breakable(row[0]) if texts else escape(row[0])
        lines.append(f'<tr><th scope="row">{first}{mark}</th>{"".join(map(_cell, row[1:]))}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    kind = ' class="texts"' if texts else ""
    return _figure(f'<div class="scroll"><table{kind}>{body}</table></div>', caption)


def details(title: str, text: str) -> str:
    """Text as it is, to be unfolded."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def breakable(text: str) -> str:
    """Escaped text that may be broken after an underscore or a dot within it."""
    return escape(text).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _drawn(label: str, images: Mapping[str, str]) -> str:
    label = escape(label.strip(" ."))
    drawn = "".join(f'<div class="{size}" role="img" aria-label="{label}">{svg}</div>' for size, svg in images.items())
    return drawn or f'<p class="missing">{NOT_MEASURED}</p>'


def _cell(text: str) -> str:
    """A table cell: a standard error on a line of its own, what is not measured set apart."""
    if text == NOT_MEASURED:
        return f'<td class="missing">{text}</td>'
    value, _, error = escape(text).partition(PLUS_MINUS)
    return f"<td>{value}<small>{PLUS_MINUS} {error}</small></td>" if error else f"<td>{value}</td>"


def _figure(body: str, caption: str) -> str:
    caption = caption.replace("'", APOSTROPHE)
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


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
<script type="module">{script}</script>
</body>
</html>
"""
