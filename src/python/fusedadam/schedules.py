# SPDX-License-Identifier: MIT
"""Learning-rate schedules in a configuration: by the name that imports them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

Schedule: TypeAlias = Callable[[int], float]


def either_name(lr: Any, learning_rate: Any, *, absent: Any) -> Any:
    """Return the learning rate, which was given under one of its two names at most."""
    if learning_rate is absent:
        return lr
    if lr is absent:
        return learning_rate
    raise TypeError(
        "lr and learning_rate are the same argument: give one. "
        f"Received: lr={lr!r}, learning_rate={learning_rate!r}"
    )


def importable_name(schedule: Schedule) -> str:
    """Return "module:qualname" of a function that can be imported under it.

    Raises
    ------
    ValueError
        There is no such name: a lambda, a local function, an instance.
    """
    module = getattr(schedule, "__module__", None)
    qualname = getattr(schedule, "__qualname__", None)
    if module is not None and qualname is not None:
        name = f"{module}:{qualname}"
        try:
            if by_name(name) is schedule:
                return name
        except (ImportError, AttributeError, ValueError):
            pass
    raise ValueError(
        "lr must be a function of a module, importable by its name, to be written into a "
        f"configuration. Received: {schedule!r}"
    )


def describe(schedule: Schedule) -> str:
    """Return what tells a reader which schedule it was, importable or not."""
    named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
    return f"{named.__module__}:{named.__qualname__}"


def by_name(name: str) -> Any:
    """Import what `importable_name` names."""
    module, _, qualname = name.partition(":")
    if not (module and qualname):
        raise ValueError(f"lr must be a number, or named as 'module:function'. Received: {name!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"lr must name a function that can be imported; {error}. Received: {name!r}"
        ) from error
    return found
