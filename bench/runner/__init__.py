# SPDX-License-Identifier: MIT
"""How the benchmark measures: processes, turns and rounds, and a description of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.contest import Contest

# A case of a section, as it is written to the file of results. If it was timed, its "seconds" map
# each contender to the time of a step in each round, and index i is the same round for all.
Row: TypeAlias = dict[str, Any]


@dataclass
class Bench:
    """How to measure. `quick` makes cases so small that their figures mean nothing."""

    contest: Contest
    threads: int
    rounds: int
    quick: bool = False
    peers: frozenset[str] | None = None  # beside fusedadam, only these take part
    say: Callable[[str], object] = field(default=lambda _words: None)

    def chosen(self, names: tuple[str, ...]) -> list[str]:
        """Return the contenders that take part in this run."""
        ours = ("fusedadam", "traffic twin", "float32", "bf16", "packed")
        return [n for n in names if self.peers is None or n in self.peers or n.startswith(ours)]

    def row(self, case: str, elements: int, seconds: dict[str, list[float]], **more: Any) -> Row:
        """Return the row of a case with tensors of this size."""
        self.say(case)
        return {
            "case": case, "dtype": "float32", "threads": self.threads, "tensors": 1,
            "elements": elements, "seconds": seconds, "not_run": {}, **more,
        }  # fmt: skip


def not_run(case: str, reasons: dict[str, str]) -> Row:
    """Return the row of a case that no contender ran."""
    return {"case": case, "elements": 0, "seconds": {}, "not_run": reasons}
