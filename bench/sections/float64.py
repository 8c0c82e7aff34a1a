# SPDX-License-Identifier: MIT
"""One float64 tensor, with all contenders that support it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers import PEERS
from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "float64"

SIZE, QUICK_SIZE = 1 << 25, 100_000


def ticks(settings: Settings) -> int:  # noqa: ARG001 - the interface of all sections
    """One, for the only case."""
    return 1


def run(settings: Settings, tick: Tick) -> Results:
    """Time the case."""
    size = QUICK_SIZE if settings.quick else SIZE
    with Contest(PEERS, settings, dtype="float64") as contest:
        row = contest.row(Case(f"1 x {size:,}", 1, size))
    tick(row["case"])
    return {"rows": [row]}
