# SPDX-License-Identifier: MIT
"""The sections of a run. Each is a function with its name, in a module of this package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from runner import Bench, Row

# Sections that time contenders in contests, one after the other, so that processes are kept.
CONTESTS = {
    "sizes": "steps",
    "float64": "steps",
    "many_tensors": "steps",
    "threads": "steps",
    "tail": "steps",
    "adapters": "frameworks",
    "storage": "storage",
}
OTHERS = {
    "memory": "memory",
    "first_step": "memory",
    "large": "memory",
    "peaks": "frameworks",
    "trainings": "trainings",
    "storage_memory": "storage",
    "imports": "imports",
    "runtimes": "neighbours",
    "at_once": "neighbours",
    "ranks": "neighbours",
}
SECTIONS = {**CONTESTS, **OTHERS}


def load(name: str) -> Callable[[Bench], list[Row]]:
    """Return a section by its name."""
    module = importlib.import_module(f"sections.{SECTIONS[name]}")
    return cast("Callable[[Bench], list[Row]]", getattr(module, name))
