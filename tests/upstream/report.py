"""What transformers' own checks said of our hybrids, as Markdown: counts, and every reason for a skip.

python tests/upstream/report.py RESULTS.xml > docs/transformers_tests.md
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


class Case(NamedTuple):
    """One check of one family and placement."""

    family: str
    placement: str
    check: str
    outcome: str  # passed, failed or skipped
    reason: str
    seconds: float


def read(path: Path) -> tuple[dict[str, str], list[Case]]:
    """The properties of a run, and its cases, from the JUnit file that pytest wrote."""
    root = ElementTree.parse(path).getroot()
    properties = {entry.attrib["name"]: entry.attrib["value"] for entry in root.iter("property")}
    cases = []
    for case in root.iter("testcase"):
        _, family, placement = case.attrib["classname"].rpartition(".")[2].split("_")
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, reason = "failed", child.attrib.get("message", "")
            elif child.tag == "skipped":
                outcome, reason = "skipped", child.attrib.get("message", "")
        cases.append(Case(family, placement, case.attrib["name"], outcome, reason, float(case.attrib["time"])))
    return properties, cases


def plain(reason: str) -> str:
    """A reason without the name of the one class that it was given for."""
    return re.sub(r"(<class ')?[\w.]*Hybrid\w+?(ForCausalLM|Model|Config)\b('>)?", r"the model", reason).strip()


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def counts(cases: list[Case]) -> str:
    """Passed, failed and skipped for every family and placement, and in all."""
    by = defaultdict(Counter)  # type: ignore[var-annotated]
    for case in cases:
        for key in ((case.family, case.placement), ("all", "")):
            by[key][case.outcome] += 1
    every = by.pop(("all", ""))
    columns = ("passed", "failed", "skipped")
    rows = [[*key, *(found[column] for column in columns)] for key, found in sorted(by.items())]
    return table(["family", "placement", *columns], [*rows, ["**all**", "", *(every[column] for column in columns)]])


def skips(cases: list[Case]) -> str:
    """Every reason with its checks and how often it was given."""
    by = defaultdict(list)
    for case in cases:
        if case.outcome == "skipped":
            by[plain(case.reason)].append(case.check.removeprefix("test_"))
    rows = [
        [reason, len(checks), ", ".join(f"`{check}`" for check in sorted(set(checks)))]
        for reason, checks in sorted(by.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return table(["reason", "skipped", "checks"], rows)


def report(properties: dict[str, str], cases: list[Case]) -> str:
    """The page."""
    left_out = [
        [name.removeprefix("left out: "), why] for name, why in properties.items() if name.startswith("left out: ")
    ]
    facts = {name: value for name, value in properties.items() if name != "placements" and ": " not in name}
    failed = [f"- `{case.family} {case.placement} {case.check}`" for case in cases if case.outcome == "failed"]
    ran = {case.check for case in cases if case.outcome != "skipped"}
    return "\n".join(
        [
            "# transformers' own checks on our hybrids",
            "",
            "Written by `make test-transformers`; do not edit. Tiny hybrids of every family, with placements "
            f"{properties.get('placements', '')}, on which transformers' own tests run as they stand. The checks of "
            "models come with transformers' source distribution; those of generation are only in its repository: give "
            "a checkout with `make test-transformers TRANSFORMERS_TESTS=FOLDER`, best of the same version.",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"- {len(cases)} checks in {sum(case.seconds for case in cases) / 60:.0f} minutes, "
            f"{len({case.check for case in cases})} different ones, of which {len(ran)} run somewhere",
            "",
            "## Counts",
            "",
            counts(cases),
            "",
            *(["## Failed", "", *failed, ""] if failed else []),
            "## Skipped, and why",
            "",
            'A reason that begins with "ours:" stands in the table `SKIPS` of `tests/upstream/checks.py`; the others '
            "are transformers' own conditions (what this machine or a decoder of text has not).",
            "",
            skips(cases),
            "",
            "## Test classes that are not run",
            "",
            table(["what", "why"], left_out),
        ]
    )


def main(files: list[str]) -> str:
    """The page of the runs in these files."""
    properties: dict[str, str] = {}
    cases: dict[tuple[str, ...], Case] = {}
    for file in files:
        found, part = read(Path(file))
        properties |= found
        cases |= {case[:3]: case for case in part}
    return report(properties, list(cases.values()))


if __name__ == "__main__":
    print(main(sys.argv[1:]))
