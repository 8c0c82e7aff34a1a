# SPDX-License-Identifier: MIT
"""What every section of the benchmark is told, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    threads: int
    rounds: int
    # Small sizes and few rounds: shows that everything runs, and no figure that means anything.
    quick: bool = False


# Called with a few words each time a piece of a section is done: it moves the progress bar.
Tick: TypeAlias = Callable[[str], None]

# JSON: {"rows": [...]} and whatever else the section has to tell.
Results: TypeAlias = dict[str, Any]
