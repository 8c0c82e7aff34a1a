# SPDX-License-Identifier: MIT
"""Sequences of calls that no Python signal handler can interrupt."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from functools import partial


def without_interruption(*calls: Callable[[], object]) -> None:
    """Make these calls in order, stopping at the first that raises.

    Python runs signal handlers between bytecode instructions, and a handler that raises, such as
    that of Ctrl-C, ends the function there. The calls must be of compiled functions, with arguments
    bound by `functools.partial`. Then no bytecode runs between them, and handlers run after the
    last.
    """
    together(*calls)()


def together(*calls: Callable[[], object]) -> Callable[[], object]:
    """Return a callable that makes these calls once, as `without_interruption` does.

    For use in `finally`, where a signal handler may raise before a Python function has started.
    """
    return partial(collections.deque, map(operator.methodcaller("__call__"), calls), maxlen=0)


def assignments(instance: object, **values: object) -> list[Callable[[], object]]:
    """Return calls for `without_interruption` that set these attributes."""
    # Not through `__dict__`: once it has been accessed, CPython 3.11 looks up attributes more
    # slowly, and a step of a small array takes a sixth longer.
    return [partial(object.__setattr__, instance, name, value) for name, value in values.items()]
