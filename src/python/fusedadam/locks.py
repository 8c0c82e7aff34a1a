# SPDX-License-Identifier: MIT
"""Locks that `os.fork` acquires first, so that no child inherits a lock held by another thread."""

from __future__ import annotations

import itertools
import operator
import os
import threading
import weakref
from typing import Any

from fusedadam.signals import without_interruption

# Held while `_locks` changes, and from before a fork until after it. Reentrant, because garbage
# collection may run meanwhile, and a finalizer may create or use an optimizer.
_registry = threading.RLock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class _Held(threading.local):
    """The locks that the forking thread holds."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_held = _Held()


def new_lock() -> threading.RLock:
    """Return a reentrant lock that no other thread holds while this process forks."""
    lock = threading.RLock()
    with _registry:
        _locks.add(lock)
    return lock


def _acquire_all() -> None:
    # To avoid a deadlock with a thread that holds one lock and waits for another: if a lock is not
    # free in time, release all and start again with that lock. The timeout doubles at each attempt,
    # since a step can take long.
    if _held.locks:
        return  # acquired by the first of the two hooks
    first: Any = _registry
    patience_s = 0.1
    interruption = None
    while first is not None:
        try:
            first = _acquire_or_give_up(first, patience_s)
        except BaseException as error:  # noqa: BLE001
            # From a signal handler. A hook cannot stop the fork: Python reports its exception and
            # forks anyway.
            interruption = error
            _release_all()
        patience_s *= 2
    if interruption is not None:
        try:
            raise interruption
        finally:
            del interruption  # breaks the reference cycle with this frame


def _acquire_or_give_up(first: Any, patience_s: float) -> Any:
    """Acquire all locks and return None, or acquire none and return one that is not free."""
    # The registry's lock must be held while `_locks` is read.
    missed = _acquire([first], -1) or _acquire([_registry], patience_s)
    missed = missed or _acquire(list(_locks), patience_s)
    if missed:
        _release_all()
        return missed[0]
    return None


def _acquire(locks: list[Any], patience_s: float) -> list[Any]:
    """Acquire these locks up to the first that is not free; return that one and the rest."""
    before = len(_held.locks)
    free = itertools.takewhile(bool, map(operator.methodcaller("acquire", True, patience_s), locks))
    # One call of compiled code: no signal handler runs between acquiring a lock and recording it.
    _held.locks.extend(itertools.compress(locks, free))
    return locks[len(_held.locks) - before :]


def _release_all() -> None:
    held = _held.locks
    without_interruption(*(lock.release for lock in held), held.clear)


if hasattr(os, "register_at_fork"):
    # Registered twice: if a signal handler raises at the first instruction of a hook, Python skips
    # that hook.
    for _ in range(2):
        os.register_at_fork(
            before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all
        )
