"""How numbers and names are written in tables and sentences."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"
PLUS_MINUS, TIMES, DASH, MINUS = "±", "\u00d7", "\u2013", "\u2212"


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


def duration(seconds: float) -> str:
    """Wall time in the unit that suits it."""
    if math.isnan(seconds):
        return NOT_MEASURED
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
