# SPDX-License-Identifier: MIT
"""Locks that `os.fork` waits for: a child must not inherit one whose holder it does not have."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

# Held while `_locks` changes, and from before a fork until after it. Reentrant: a garbage collection
# can come in between, and what it frees may make or use an optimizer.
_registry = threading.RLock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []


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
    first: Any = _registry
    patience_s = 0.1
    while True:
        first.acquire()
        held = [first]
        missed = _acquire_rest(held, patience_s)
        if missed is None:
            break
        _release(held)
        first = missed
        patience_s *= 2
    _held.extend(held)


def _acquire_rest(held: list[Any], patience_s: float) -> Any:
    """Add all locks to those held, the registry's before it is read; return one that is not free."""
    if not _registry.acquire(timeout=patience_s):
        return _registry
    held.append(_registry)
    for lock in list(_locks):
        if not lock.acquire(timeout=patience_s):
            return lock
        held.append(lock)
    return None


def _release(held: list[Any]) -> None:
    while held:
        held.pop().release()


def _release_all() -> None:
    _release(_held)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all
    )
