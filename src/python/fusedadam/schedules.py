# SPDX-License-Identifier: MIT
"""Learning-rate schedules in a configuration: by the name that imports them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeAlias

from fusedadam._core import AdamOptions

Schedule: TypeAlias = Callable[[int], float]

# Whether a configuration is for a checkpoint, which need not name a schedule: `load` asks for it.
_for_checkpoint: Final = ContextVar("for_checkpoint", default=False)


def saved_config(get_config: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a configuration in which schedules need not be importable."""
    # In a copy of the context: an interrupt cannot leave the variable set in this one.
    context = copy_context()
    context.run(_for_checkpoint.set, True)
    return context.run(get_config)


def require_not_negative(options: AdamOptions) -> AdamOptions:
    """Return these options, unless `lr` is below 0, with which only schedules of PyTorch end."""
    if options.lr < 0:
        raise ValueError(f"lr must be finite and >= 0. Received: lr={options.lr!r}")
    return options


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


def configured(schedule: Schedule) -> str:
    """Return what a configuration calls a schedule: "module:qualname", which imports it.

    In a checkpoint, the name need not be importable.

    Raises
    ------
    ValueError
        There is no such name: a lambda, a local function, an instance.
    """
    if _for_checkpoint.get():
        named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
        return f"{named.__module__}:{named.__qualname__}"
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


def by_name(name: str) -> Any:
    """Import what `configured` names."""
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
