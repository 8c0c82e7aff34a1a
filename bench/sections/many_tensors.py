# SPDX-License-Identifier: MIT
"""Many small tensors in one step, which shows the overhead per tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers import PEERS
from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "Many small tensors"

# Number of tensors, and elements of each.
CASES = (
    (1, 1_000),
    (10, 1_000),
    (100, 1_000),
    (1_000, 1_000),
    (10_000, 1_000),
    (100_000, 1_000),
    (100_000, 100),
)
QUICK_CASES = ((2_000, 100),)


def cases(settings: Settings) -> list[Case]:
    """Return the cases."""
    shapes = QUICK_CASES if settings.quick else CASES
    return [Case(f"{tensors:,} x {size:,}", tensors, size) for tensors, size in shapes]


def ticks(settings: Settings) -> int:
    """One per case."""
    return len(cases(settings))


def run(settings: Settings, tick: Tick) -> Results:
    """Time each case."""
    rows = []
    with Contest(PEERS, settings) as contest:
        for case in cases(settings):
            rows.append(contest.row(case))
            tick(case.name)
    return {"rows": rows}
