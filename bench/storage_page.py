# SPDX-License-Identifier: MIT
"""The documentation of what is stored in fewer bits, in Markdown: steps, costs and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from figures import beyond_expected
from formats import FLOAT32, FORMATS, PACKED, parts_of
from rows import (
    Row,
    as_bytes,
    as_count,
    as_ratio,
    as_time,
    digits,
    median,
    table,
    time_with_quartiles,
    with_quartiles,
)
from storage_model import Cost, core_bandwidth, costs_of, measured_speed, timed_in_memory
from tables import DASH, reasons, with_reasons

Results: TypeAlias = Mapping[str, Any]

MODEL = """\
The plot is a formula: an element takes as long as its bytes at the bandwidth of a core, or its \
instructions, whichever is longer. The constants of each format are the bytes that it moves and its \
time in cache, on one thread:"""


def storage_part(results: Results) -> str:
    """Return the caption of the plot, a table of steps for each size, and the costs."""
    costs = costs_of(results)
    rows = timed_in_memory(results)
    parts = [caption(costs, rows, results["isa"])] if costs and rows else []
    for row in rows:
        parts += [f"**{as_count(row['elements'])} elements**", steps_table(row, results["isa"])]
        parts += reasons([row], sorted(row["not_run"]))
    if costs:
        parts += [MODEL, costs_table(costs)]
    return "\n\n".join(parts)


def caption(costs: Mapping[str, Mapping[str, Cost]], rows: list[Row], isa: str) -> str:
    """Say from which bandwidth on packed state costs speed."""
    limits = [
        f"{digits(of_isa[PACKED].wins_below(of_isa[FLOAT32]) / 1e9)} GB/s with {name}"
        for name, of_isa in costs.items()
        if PACKED in of_isa
    ]
    here = core_bandwidth(rows[0], isa)
    machine = f" ({digits(here / 1e9)} GB/s here)" if here else ""
    return (
        f"*The speed of each format relative to float32, over the bandwidth of a core while all "
        f"cores step{machine}. Lines: the cost model; points: measured at "
        f"{as_count(rows[0]['elements'])}. `{PACKED}` is faster than float32 where a core has less "
        f"than {' or '.join(limits)}.*"
    )


def steps_table(row: Row, isa: str) -> str:
    """Return the table of steps of one size."""
    cells = []
    for name, seconds in row["seconds"].items():
        format_name, of_isa = parts_of(name) or (name, "")
        figure = measured_speed(row, name, of_isa or isa)
        traffic = DASH
        if of_isa:
            moved = FORMATS[format_name].moved * row["elements"]
            traffic = digits(moved / median(seconds) / 1e9)
        cells.append(
            [
                format_name,
                of_isa or DASH,
                f"{row['held_bytes'][name] / row['elements']:.2f}",
                as_time(median(seconds)),
                traffic,
                DASH if figure is None else with_quartiles(figure),
            ]
        )
    header = [
        "stored",
        "instructions",
        "bytes a parameter",
        "step",
        "GB/s",
        "speed relative to float32",
    ]
    return table(header, cells)


def costs_table(costs: Mapping[str, Mapping[str, Cost]]) -> str:
    """Return the table of the constants, and of the bandwidths where a format wins."""
    cells = []
    for isa, of_isa in costs.items():
        for name, cost in of_isa.items():
            wins = DASH
            if name != FLOAT32:
                limit = cost.wins_below(of_isa[FLOAT32])
                wins = "always" if math.isinf(limit) else f"below {digits(limit / 1e9)} GB/s"
            nanoseconds = f"{as_ratio(1e9 * cost.compute)} ns"
            cells.append([name, isa, f"{cost.moved}", nanoseconds, wins])
    header = ["stored", "instructions", "bytes moved", "in cache", "faster than float32"]
    return table(header, cells)


def storage_memory_part(results: Results) -> str:
    """Return the table of peaks, and that of the large step."""
    cells = []
    for row in results["rows"]:
        seconds = row.get("seconds", {}).get(PACKED)
        cells.append(
            [
                row.get("case", row["contender"]),
                as_count(row["elements"]),
                f"{row['held_bytes'] / row['elements']:.2f}",
                as_bytes(row["peak_bytes"] - row["baseline_bytes"]),
                f"{beyond_expected(row) / 1e6:,.1f} MB",
                DASH if seconds is None else time_with_quartiles(seconds),
            ]
        )
    header = ["work", "parameters", "bytes a parameter", "at peak", "beyond", "step"]
    return with_reasons(table(header, cells), results)
