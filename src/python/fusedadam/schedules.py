# SPDX-License-Identifier: MIT
"""Learning rates and schedules: their names in a configuration, and checks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeAlias

from fusedadam._core import AdamOptions

Schedule: TypeAlias = Callable[[int], float]

# Whether the configuration is for a checkpoint. A schedule in it need not be importable, because
# `load` takes the schedule from the caller.
_for_checkpoint: Final = ContextVar("for_checkpoint", default=False)


def saved_config(get_config: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a configuration in which schedules need not be importable."""
    # In a copy of the context, so that an interrupt cannot leave the variable set in this one.
    context = copy_context()
    context.run(_for_checkpoint.set, True)
    return context.run(get_config)


def require_not_negative(options: AdamOptions) -> AdamOptions:
    """Return these options, or raise if `lr` < 0: the core allows it for PyTorch's schedulers."""
    if options.lr < 0:
        raise ValueError(f"lr must be finite and >= 0. Received: lr={options.lr!r}")
    return options


def either_name(lr: Any, learning_rate: Any, *, absent: Any) -> Any:
    """Return the learning rate, given under at most one of its two names."""
    if learning_rate is absent:
        return lr
    if lr is absent:
        return learning_rate
    raise TypeError(
        "lr and learning_rate are the same argument: give one. "
        f"Received: lr={lr!r}, learning_rate={learning_rate!r}"
    )


def configured(schedule: Schedule) -> str:
    """Return the name of a schedule in a configuration, "module:qualname".

    It must be importable (not a lambda, a local function or an instance), unless the configuration
    is for a checkpoint.
    """
    if _for_checkpoint.get():
        named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
        return f"{named.__module__}:{named.__qualname__}"
    if hasattr(schedule, "__module__") and hasattr(schedule, "__qualname__"):
        name = f"{schedule.__module__}:{schedule.__qualname__}"
        with contextlib.suppress(ValueError):
            if by_name(name) is schedule:
                return name
    raise ValueError(
        "lr must be a module-level function, importable by its name, to be part of a "
        f"configuration. Received: {schedule!r}"
    )


def by_name(name: str) -> Any:
    """Import a schedule by its name from `configured`."""
    module, _, qualname = name.partition(":")
    if not (module and qualname):
        raise ValueError(f"lr must be a number or a name 'module:function'. Received: {name!r}")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"lr must name a function that can be imported; {error}. Received: {name!r}"
        ) from error
    return found
