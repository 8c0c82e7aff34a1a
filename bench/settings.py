# SPDX-License-Identifier: MIT
"""The interface of the sections of the benchmark: settings, progress and results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    threads: int
    rounds: int
    # Small sizes and few rounds: a smoke test whose figures mean nothing.
    quick: bool = False


# Advances the progress bar. Called with a short description after each part of a section.
Tick: TypeAlias = Callable[[str], None]

# JSON: {"rows": [...]} and further entries that depend on the section.
Results: TypeAlias = dict[str, Any]
