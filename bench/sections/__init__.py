# SPDX-License-Identifier: MIT
"""The sections of a run. Each is a module, which is loaded by name and prints nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from settings import Results, Settings, Tick

# In their order in a run.
NAMES = (
    "sizes",
    "float64",
    "many_tensors",
    "threads",
    "tail",
    "first_step",
    "memory",
    "large",
    "calls",
    "training",
    "sparse_rows",
    "imports",
    "neighbours",
    "adapters",
    "callbacks",
    "ranks",
    "at_once",
    "runtimes",
    "storage",
    "storage_memory",
)


class Section(Protocol):
    """A module of this package."""

    TITLE: str

    def ticks(self, settings: Settings) -> int:
        """Return the number of times that `run` calls `tick`."""

    def run(self, settings: Settings, tick: Tick) -> Results:
        """Run the measurements, and return their results."""


def load(name: str) -> Section:
    """Return a section by its name."""
    return cast("Section", importlib.import_module(f"sections.{name}"))
