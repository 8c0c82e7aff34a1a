# SPDX-License-Identifier: MIT
"""Locks that `os.fork` waits for: a child must not inherit one whose holder it does not have."""

from __future__ import annotations

import itertools
import operator
import os
import threading
import weakref
from typing import Any

from fusedadam.signals import without_interruption

# Held while `_locks` changes, and from before a fork until after it. Reentrant: a garbage collection
# can come in between, and what it frees may make or use an optimizer.
_registry = threading.RLock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class _Held(threading.local):
    """What the thread that forks holds."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_held = _Held()


def new_lock() -> threading.RLock:
    """Return a reentrant lock that nobody holds when a process forks, but the thread that forks."""
    lock = threading.RLock()
    with _registry:
        _locks.add(lock)
    return lock


def _acquire_all() -> None:
    # A thread that has one of the locks may need another of them, or the registry's, before it lets
    # go. So what is held is given up when a lock is not free for some time, twice as long each time
    # since a step can be long; then it begins with that lock.
    if _held.locks:
        return  # by the first of the two hooks
    first: Any = _registry
    patience_s = 0.1
    interruption = None
    while first is not None:
        try:
            first = _acquire_or_give_up(first, patience_s)
        except BaseException as error:  # noqa: BLE001
            # Of a signal. There is no stopping a fork from here: Python reports what a hook raises,
            # and forks.
            interruption = error
            _release_all()
        patience_s *= 2
    if interruption is not None:
        try:
            raise interruption
        finally:
            del interruption  # it refers to this frame


def _acquire_or_give_up(first: Any, patience_s: float) -> Any:
    """Hold all locks, the registry's before it is read; or none, and return one that is not free."""
    missed = _acquire([first], -1) or _acquire([_registry], patience_s)
    missed = missed or _acquire(list(_locks), patience_s)
    if missed:
        _release_all()
        return missed[0]
    return None


def _acquire(locks: list[Any], patience_s: float) -> list[Any]:
    """Add these locks to those held, up to one that is not free; return the others."""
    before = len(_held.locks)
    free = itertools.takewhile(bool, map(operator.methodcaller("acquire", True, patience_s), locks))
    # In one call of compiled code: no signal comes between a lock and its place in the list.
    _held.locks.extend(itertools.compress(locks, free))
    return locks[len(_held.locks) - before :]


def _release_all() -> None:
    held = _held.locks
    without_interruption(*(lock.release for lock in held), held.clear)


if hasattr(os, "register_at_fork"):
    # Twice: what a signal raises in the first instruction of a hook makes Python pass over it.
    for _ in range(2):
        os.register_at_fork(
            before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all
        )
