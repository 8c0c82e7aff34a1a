# SPDX-License-Identifier: MIT
"""One float32 tensor, from 100 to 256M elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers import PEERS
from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "One tensor"

SIZES = (100, 1_000, 10_000, 100_000, 1 << 20, 10_000_000, 1 << 26, 100_000_000)
QUICK_SIZES = (100,)
# At the largest size, memory is the only limit. Only the contenders that come near it are timed;
# more would not fit in memory.
LARGEST, QUICK_LARGEST = 1 << 28, 1 << 20
AT_LARGEST = ("fusedadam", "traffic twin", "torch fused", "deepspeed")


def sizes(settings: Settings) -> tuple[int, ...]:
    """Return the sizes for all contenders."""
    return QUICK_SIZES if settings.quick else SIZES


def ticks(settings: Settings) -> int:
    """One per size."""
    return len(sizes(settings)) + 1


def run(settings: Settings, tick: Tick) -> Results:
    """Time each size."""
    rows = []
    with Contest(PEERS, settings) as contest:
        for size in sizes(settings):
            rows.append(contest.row(Case(f"1 x {size:,}", 1, size)))
            tick(f"1 x {size:,}")
    size = QUICK_LARGEST if settings.quick else LARGEST
    with Contest(AT_LARGEST, settings) as contest:
        rows.append(contest.row(Case(f"1 x {size:,}", 1, size)))
        tick(f"1 x {size:,}")
    return {"rows": rows}
