# SPDX-License-Identifier: MIT
"""Up to a billion parameters: 16 GB with gradients and moments. The time should grow linearly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rounds import ALWAYS, Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "Up to a billion parameters"

SIZES = (1 << 26, 1 << 28, 1 << 29, 1_000_000_000)
QUICK_SIZES = (1 << 20, 1 << 21)


def ticks(settings: Settings) -> int:
    """One a size."""
    return len(QUICK_SIZES if settings.quick else SIZES)


def run(settings: Settings, tick: Tick) -> Results:
    """Time one size after the other, each alone in memory."""
    rows = []
    for size in QUICK_SIZES if settings.quick else SIZES:
        # New processes each time, so that nothing of the size before is left.
        with Contest(ALWAYS, settings) as contest:
            rows.append(contest.row(Case(f"1 x {size:,}", 1, size)))
        tick(f"1 x {size:,}")
    return {"rows": rows}
