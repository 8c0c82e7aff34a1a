# SPDX-License-Identifier: MIT
"""Access to results, and how figures are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import pandas as pd
from runner import Row

# Section -> its results, as in the file.
Sections: TypeAlias = Mapping[str, Any]

OURS, TWIN = "fusedadam", "traffic twin"
DASH = "—"
# Memory traffic per element, in bytes. A step reads p, g, m and v, and writes p, m and v. A
# training tail also reads g for the norm, reads and writes the average, and zeroes g.
STEP_BYTES, TAIL_BYTES = 28, 44


class NotMeasuredError(LookupError):
    """The results lack a figure. The message says why."""


def row_of(sections: Sections, section: str, case: str) -> Row:
    """Return the row of a case, or raise."""
    for row in sections.get(section, {"rows": []})["rows"]:
        if row["case"] == case:
            found: Row = row
            return found
    raise NotMeasuredError(f"no {case} in {section} of this run")


def times(row: Row, *contenders: str) -> pd.DataFrame:
    """Return the seconds of a row: a line for each round, a column for each contender.

    Raises if one of the named contenders was not timed.
    """
    for name in contenders:
        if name not in row["seconds"]:
            raise NotMeasuredError(row["not_run"].get(name, f"{name} was not run"))
    return pd.DataFrame(row["seconds"])


def ratio(row: Row, contender: str, ours: str = OURS) -> pd.Series:
    """Return a contender's time over ours, round by round, so that the machine's load cancels.

    For the traffic twin, this is the fraction of its speed that we reach.
    """
    seconds = times(row, contender, ours)
    return seconds[contender] / seconds[ours]


def cpu_ratio(row: Row) -> pd.Series:
    """Return the CPU time of the second contender over that of the first, ours."""
    if not row["seconds"]:
        raise NotMeasuredError("; ".join({*row["not_run"].values()}))
    ours, stock = row["seconds"]
    return ratio({**row, "seconds": row["cpu_seconds"]}, stock, ours)


def beyond(row: Row) -> float:
    """Return the bytes at peak beyond the process and what a step needs."""
    return float(row["peak_bytes"] - row["baseline_bytes"] - row["expected_bytes"])


# ---- how figures are written -------------------------------------------------------------------


def digits(value: float) -> str:
    """Format a number with three significant digits, or as an integer with separators."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def as_time(seconds: float) -> str:
    """Format a time in a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-9)} ns"


def as_ratio(value: float) -> str:
    """Format a ratio: two decimals from 0.1 to 10, else three significant digits."""
    return f"{value:.2f}" if 0.095 <= abs(value) < 9.995 else digits(value)


def as_bytes(count: float) -> str:
    """Format an amount of memory in decimal units, as for bandwidths."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(count) >= size:
            return f"{digits(count / size)} {unit}"
    return f"{count / 1e6:.1f} MB"


def as_count(number: int) -> str:
    """Abbreviate a count: 1k, 1M, 1B. Powers of two use binary units: 1 << 26 is 64M."""
    for suffix, decimal, binary in (
        ("B", 10**9, 1 << 30),
        ("M", 10**6, 1 << 20),
        ("k", 1_000, 1 << 10),
    ):
        if number >= binary and number % binary == 0 and number % decimal != 0:
            return f"{number // binary}{suffix}"
        if number >= decimal:
            return f"{number / decimal:.4g}{suffix}"
    return str(number)


def quartiles(values: Any, write: Callable[[float], str] = as_ratio) -> str:
    """Format the median of some values with its quartiles: "11.5 (11.2 to 12.1)"."""
    low, middle, high = map(write, pd.Series(values).quantile([0.25, 0.5, 0.75]))
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table, with a column for each key."""
    frame = pd.DataFrame(list(records)).fillna(DASH)
    text: str = frame.to_markdown(index=False, tablefmt="github", disable_numparse=True)
    return text


def one_line(text: str) -> str:
    """Return a message on one line that a table can hold."""
    return " ".join(text.split()).rstrip(".").replace("|", "/")
