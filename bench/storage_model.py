# SPDX-License-Identifier: MIT
r"""A cost model of the formats that store less than float32. Its constants are measured.

On each thread, an element takes as long as its bytes from memory or its instructions, whichever is
longer:

    seconds = max(compute, bytes / bandwidth)

`bytes` is what a step reads and writes, by the definition of the format. `compute` is measured
without memory traffic: the time per element and thread in cache. `bandwidth` is that of a core
while all cores step. So a format with fewer bytes and more instructions than float32 wins where a
core has less bandwidth than a certain one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from formats import FLOAT32, FORMATS, contender, parts_of
from rows import Row, Spread, median, round_by_round


class Cost(NamedTuple):
    """The constants of a format on an instruction set."""

    moved: int  # bytes that a step moves for an element
    compute: float  # seconds per element and thread, in cache

    def seconds(self, bandwidth: float) -> float:
        """Return the seconds per element and thread, at this bandwidth of a core."""
        return max(self.compute, self.moved / bandwidth)

    def speed(self, base: Cost, bandwidth: float) -> float:
        """Return the speed relative to another format."""
        return base.seconds(bandwidth) / self.seconds(bandwidth)

    def wins_below(self, base: Cost) -> float:
        """Return the bandwidth of a core below which this format is faster than one of more bytes.

        It is infinite if this format needs no more instructions either.
        """
        if self.moved >= base.moved:
            raise ValueError(
                "a format must move fewer bytes than the other one. "
                f"Received: {self.moved} and {base.moved}"
            )
        return math.inf if self.compute <= base.compute else base.moved / self.compute


def timed_in_memory(results: Mapping[str, Any]) -> list[Row]:
    """Return the rows of large tensors, the largest first."""
    return [row for row in results["rows"] if "held_bytes" in row]


def costs_of(results: Mapping[str, Any]) -> dict[str, dict[str, Cost]]:
    """Return the costs of each format, by instruction set: {} if they were not measured."""
    cached = [row for row in results["rows"] if "held_bytes" not in row]
    costs: dict[str, dict[str, Cost]] = {}
    if len(cached) != 2:
        return costs
    small, large = sorted(cached, key=lambda row: int(row["elements"]))
    for name in large["seconds"]:
        parts = parts_of(name)
        if parts is not None and name in small["seconds"]:
            format_name, isa = parts
            compute = slope(small, large, name)
            costs.setdefault(isa, {})[format_name] = Cost(FORMATS[format_name].moved, compute)
    return {isa: of_isa for isa, of_isa in costs.items() if FLOAT32 in of_isa}


def slope(small: Row, large: Row, name: str) -> float:
    """Return the seconds per element without the overhead of a call, which both rows have."""
    difference = median(large["seconds"][name]) - median(small["seconds"][name])
    # In a quick run, noise may exceed the difference.
    return max(difference, 1e-9) / int(large["elements"] - small["elements"])


def core_bandwidth(row: Row, isa: str) -> float | None:
    """Return the bytes per second and core that float32 moves, or None if it was not timed."""
    name = contender(FLOAT32, isa)
    if name not in row["seconds"]:
        return None
    moved = FORMATS[FLOAT32].moved * int(row["elements"])
    return moved / (median(row["seconds"][name]) * int(row["threads"]))


def measured_speed(row: Row, name: str, isa: str) -> Spread | None:
    """Return the speed of a contender relative to float32, round by round, or None."""
    seconds: Mapping[str, Sequence[float]] = row["seconds"]
    base = contender(FLOAT32, isa)
    if name not in seconds or base not in seconds:
        return None
    return round_by_round(seconds[base], seconds[name])
