# SPDX-License-Identifier: MIT
"""Evaluation of the rows of a run: medians, ratios round by round, and number formats.

A *timed row* is one case as `run.py` writes it. Its `seconds` map each contender to the time of a
step in each round. Index i is the same round for all contenders, so that the load of the machine
cancels in a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Row: TypeAlias = dict[str, Any]

OURS = "fusedadam"
TWIN = "traffic twin"
# In their order in tables and plots.
PEERS = (
    "torch fused",
    "torch foreach",
    "torch default",
    "torch",
    "deepspeed",
    "numba",
    "tensorflow ResourceApplyAdam",
    "keras tensorflow",
    "keras torch",
    "optax",
    "numpy",
)

# Memory traffic per element, in bytes. A step reads p, g, m and v, and writes p, m and v. A
# training tail also reads g for the norm, reads and writes the average, and zeroes g.
STEP_BYTES = {"float32": 28, "float64": 56}
TAIL_BYTES = {"float32": 44, "float64": 88}

# Relative tolerance of sizes: "1M" is a power of two in some sections and 1,000,000 in others.
SAME_SIZE = 0.1


class Spread(NamedTuple):
    """A median and its quartiles."""

    low: float
    middle: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(low), float(middle), float(high))


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return spread(values).middle


def round_by_round(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the median and the quartiles of the ratio of each round."""
    if len(numerators) != len(denominators):
        raise ValueError(
            "numerators and denominators must have one value a round each. "
            f"Received: {len(numerators)} and {len(denominators)} values"
        )
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def ratio(row: Row, contender: str, ours: str = OURS) -> Spread | None:
    """Return the time of a contender relative to fusedadam, or None if either was not timed.

    For the traffic twin, this is the fraction of its speed that fusedadam reaches. `ours` is the
    name of fusedadam in this row: an adapter has its own name.
    """
    seconds = row["seconds"]
    if contender not in seconds or ours not in seconds:
        return None
    return round_by_round(seconds[contender], seconds[ours])


def growth(row: Row) -> Spread:
    """Return the time per element, relative to a step of only the first `part` elements."""
    seconds, size = row["seconds"], all_elements(row)
    part = [t * (size / row["part"]) for t in seconds["part"]]
    return round_by_round(seconds[OURS], part)


def all_elements(row: Row) -> int:
    """Return the total number of elements of all tensors of a row."""
    return int(row.get("tensors", 1)) * int(row["elements"])


def is_about(size: float, wanted: float) -> bool:
    """Return whether two sizes are equal up to the meaning of M: 1,000,000 or 1 << 20."""
    return abs(size - wanted) <= SAME_SIZE * wanted


def find(
    rows: Iterable[Row], *, tensors: int = 1, elements: float, threads: int | None = None
) -> Row | None:
    """Return the first row with these tensors, elements per tensor and threads, or None."""
    for row in rows:
        if (
            int(row.get("tensors", 1)) == tensors
            and is_about(row["elements"], elements)
            and (threads is None or row.get("threads", threads) == threads)
        ):
            return row
    return None


def contenders_of(rows: Iterable[Row]) -> list[str]:
    """Return the contenders timed in any row: fusedadam, the twin, then the peers in order."""
    seen = dict.fromkeys(name for row in rows for name in row["seconds"])
    known = [name for name in (OURS, TWIN, *PEERS) if name in seen]
    return known + [name for name in seen if name not in known]


# ---- how figures are written -------------------------------------------------------------------


def digits(value: float, significant: int = 3) -> str:
    """Format a number with this many significant digits and with thousands separators."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    # 9.996 becomes 10.0 and not 10.00.
    rounded = round(value, decimals)
    if rounded != 0:
        decimals = max(0, significant - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def as_time(seconds: float) -> str:
    """Format a time in a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-9)} ns"


def as_ratio(value: float) -> str:
    """Format a ratio: two decimals from 0.1 to 10, else two or three significant digits."""
    if abs(value) < 0.095:
        return digits(value, 2)
    return f"{value:.2f}" if abs(value) < 9.995 else digits(value)


def with_quartiles(figure: Spread) -> str:
    """Format a ratio with its quartiles: "11.5 (11.2 to 12.1)"."""
    return f"{as_ratio(figure.middle)} ({as_ratio(figure.low)} to {as_ratio(figure.high)})"


def time_with_quartiles(seconds: Sequence[float]) -> str:
    """Format the median of times with its quartiles."""
    low, middle, high = spread(seconds)
    return f"{as_time(middle)} ({as_time(low)} to {as_time(high)})"


def as_error(share: float) -> str:
    """Format a deviation in percent, with a sign unless it rounds to zero."""
    text = f"{100 * share:+.1f} %"
    return "0.0 %" if text in ("+0.0 %", "-0.0 %") else text


def as_count(value: float) -> str:
    """Abbreviate a count: 1k, 1M, 1B. Powers of two use binary units: 1 << 26 is 64M."""
    number = int(value)
    for suffix, decimal, binary in (
        ("B", 10**9, 1 << 30),
        ("M", 10**6, 1 << 20),
        ("k", 10**3, 1 << 10),
    ):
        if number >= binary and number % binary == 0 and number % decimal != 0:
            return f"{number // binary:,}{suffix}"
        if number >= decimal:
            return f"{number / decimal:.4g}{suffix}"
    return f"{number}"


def as_bytes(count: float) -> str:
    """Format an amount of memory in decimal units, as for bandwidths."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{digits(count / size)} {unit}"
    return f"{count:.0f} B"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
