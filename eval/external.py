"""Models measured elsewhere: a CSV of their accuracy and speed, to stand on the Pareto plot beside a run's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from distill.errors import UserError, brief, nearest

NEEDED = ("name", "accuracy")
SPEEDS = ("ratio", "tokens_per_second")
COLUMNS = (*NEEDED, *SPEEDS, "accuracy_stderr", "tokens")
EXAMPLE = "name,accuracy,ratio"
ABOUT = (
    f"it needs the columns {' and '.join(NEEDED)} (a fraction in [0, 1], comparable to the run's mean generative "
    f"accuracy) and one of {' or '.join(SPEEDS)} (against the run's teacher, or measured as it was); "
    "accuracy_stderr and tokens may follow"
)


def read_external(file: Path) -> tuple[pd.DataFrame, list[str]]:
    """The models of a CSV: name, accuracy, accuracy_stderr, ratio, tokens_per_second, tokens (NaN: not given), and
    what is to be said of it: columns that are not read, models that lack a value.

    Raises UserError for a file that cannot be read, lacks a column or holds a value that is none.
    """
    try:
        cells = pd.read_csv(file, header=None, dtype=str, keep_default_na=False, skipinitialspace=True)
    except FileNotFoundError as error:
        raise UserError(f"--external: there is no file {file}") from error
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"--external: {file} is no CSV file: {brief(error)}; {ABOUT}") from error
    cells = cells.apply(lambda column: column.str.strip())
    _check_columns(file, list(cells.iloc[0]))
    if len(cells) < 2:
        raise UserError(f"--external: {file} has a header and no model below it")
    table = cells.iloc[1:].set_axis(list(cells.iloc[0]), axis=1).reset_index(drop=True)
    frame = pd.DataFrame({"name": table["name"]})
    for column in COLUMNS[1:]:
        given = table[column] if column in table else [""] * len(table)
        frame[column] = [_number(file, line, column, text) for line, text in enumerate(given, start=2)]
    _check_names(file, list(frame["name"]))
    ignored = [column for column in table.columns if column not in COLUMNS]
    notes = [f"{file.name}: not read: {', '.join(ignored)}"] if ignored else []
    for _, row in frame.iterrows():
        lacks = ["accuracy"] if math.isnan(row["accuracy"]) else []
        lacks += ["speed"] if all(math.isnan(row[column]) for column in SPEEDS) else []
        if lacks:
            notes.append(f"{file.name}: {row['name']} has no {' and no '.join(lacks)}: it is not on the plot")
    return frame, notes


def _check_columns(file: Path, given: Sequence[str]) -> None:
    """Raise UserError where a column is there twice or a needed one is missing, naming the nearest that is there."""
    doubled = next((column for column in given if given.count(column) > 1), None)
    if doubled is not None:
        raise UserError(f"--external: {file} has two columns '{doubled}'")
    missing = [column for column in NEEDED if column not in given]
    if not set(SPEEDS) & set(given):
        missing.append(" or ".join(SPEEDS))
    if missing:
        spare = [column for column in given if column not in COLUMNS]
        hints = {column: nearest(column.split(" or ")[0], spare) or nearest(column, spare) for column in missing}
        raise UserError(
            f"--external: {file} has no column {' and no column '.join(c + hints[c] for c in missing)}; it has "
            f"{', '.join(given) or 'none'}; {ABOUT}. For example: {EXAMPLE}"
        )


def _check_names(file: Path, names: Sequence[str]) -> None:
    """Raise UserError where a model has no name, or two have the same."""
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"--external: {file}, line {i + 2}: the model has no name")
        if name in names[:i]:
            raise UserError(
                f"--external: {file}, line {i + 2}: '{name}' stands in line {names.index(name) + 2} already: "
                "give each model a name of its own"
            )


def _number(file: Path, line: int, column: str, text: str) -> float:
    """The number in a cell, NaN for an empty one (also na, nan, none, -)."""
    if text.lower() in ("", "na", "n/a", "nan", "none", "null", "-"):
        return math.nan
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"--external: {file}, line {line}: {column}={brief(text, 40)} is no number") from error
    if column.startswith("accuracy") and not 0 <= value <= 1:
        hint = f"; per cent? then write {value / 100:g}" if 1 < value <= 100 else ""
        raise UserError(f"--external: {file}, line {line}: {column}={text} is no fraction in [0, 1]{hint}")
    if not 0 <= value < math.inf or (column in SPEEDS and value == 0):
        raise UserError(f"--external: {file}, line {line}: {column}={text} must be a finite number above 0")
    return value
