# SPDX-License-Identifier: MIT
"""A training tail: clip by the global norm, decay and step, average, zero the gradients.

The gradients are set again before each step, outside of the timing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers import TAIL_PEERS
from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "Training tail"

SIZES = (1 << 20, 1 << 26)
QUICK_SIZES = (10_000,)


def ticks(settings: Settings) -> int:
    """One per size."""
    return len(QUICK_SIZES if settings.quick else SIZES)


def run(settings: Settings, tick: Tick) -> Results:
    """Time each size."""
    rows = []
    with Contest(TAIL_PEERS, settings, tail=True) as contest:
        for size in QUICK_SIZES if settings.quick else SIZES:
            rows.append(contest.row(Case(f"1 x {size:,}", 1, size)))
            tick(f"1 x {size:,}")
    return {"rows": rows}
