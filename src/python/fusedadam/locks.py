# SPDX-License-Identifier: MIT
"""Locks that `os.fork` waits for: a child must not inherit one whose holder it does not have."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_registry = threading.Lock()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []


def new_lock() -> threading.RLock:
    """Return a reentrant lock that nobody holds when a process forks, but the thread that forks."""
    lock = threading.RLock()
    with _registry:
        _locks.add(lock)
    return lock


def _acquire_all() -> None:
    _registry.acquire()
    for lock in _locks:
        lock.acquire()
        _held.append(lock)


def _release_all() -> None:
    while _held:
        _held.pop().release()
    _registry.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all
    )
