# SPDX-License-Identifier: MIT
"""Calls that belong together, whatever signal comes."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from functools import partial


def without_interruption(*calls: Callable[[], object]) -> None:
    """Make these calls one after the other; what one of them raises ends it.

    Python runs the handlers of signals between two of its instructions, and where one raises, as
    that of Ctrl-C does, a function ends there. These calls must be of compiled functions, with their
    arguments by `functools.partial`: then nothing of Python's comes between them, and what a signal
    raises meanwhile comes when all are done.
    """
    together(*calls)()


def together(*calls: Callable[[], object]) -> Callable[[], object]:
    """Return what makes these calls as `without_interruption` does, once.

    For a `finally`, where a signal may end a function of Python's before it has begun.
    """
    return partial(collections.deque, map(operator.methodcaller("__call__"), calls), maxlen=0)


def assignments(instance: object, **values: object) -> list[Callable[[], object]]:
    """Calls for `without_interruption` that set these attributes."""
    # Not by the dictionary of the instance: once it was asked for, CPython 3.11 looks up each
    # attribute in it, and a step of a small array takes a sixth longer.
    return [partial(object.__setattr__, instance, name, value) for name, value in values.items()]
