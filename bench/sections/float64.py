# SPDX-License-Identifier: MIT
"""One tensor of float64, against all that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers import PEERS
from rounds import Case, Contest

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

TITLE = "float64"

SIZE, QUICK_SIZE = 1 << 25, 100_000


def ticks(settings: Settings) -> int:  # noqa: ARG001 - as all sections
    """One."""
    return 1


def run(settings: Settings, tick: Tick) -> Results:
    """Time a step."""
    size = QUICK_SIZE if settings.quick else SIZE
    with Contest(PEERS, settings, dtype="float64") as contest:
        row = contest.row(Case(f"1 x {size:,}", 1, size))
    tick(row["case"])
    return {"rows": [row]}
