# SPDX-License-Identifier: MIT
"""Calls under a limit of the address space that rises until they succeed.

Needs its own interpreter with MALLOC_MMAP_THRESHOLD_ set. Then every large array is new address
space, which is subject to the limit, and no memory that malloc has kept.
"""

from __future__ import annotations

import contextlib
import functools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import fusedadam
from calls import CALLS, Scene
from interrupts import Case

# The size of each array, far more than Python and NumPy allocate otherwise.
MIB = 1 << 20
# The increment of the limit: half an array, so that each array is missing once.
_RISE = MIB // 2


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """Limit the address space to this many bytes more than now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def exhaust(make: Callable[[], Case], errors: tuple[type[Exception], ...] = (MemoryError,)) -> int:
    """Repeat a call with ever more memory until it succeeds. Return the number of failures.

    Each failure must be one of `errors` and must change nothing. Afterwards the call must succeed
    with the correct result once there is memory.
    """
    undone, done, on = make(), make(), make()
    before = undone.observe()
    done.call()
    after = done.observe()
    on.call()
    on.go_on()
    after_and_on = on.observe()
    failures = 0
    while True:
        case = make()
        try:
            with limited(failures * _RISE):
                case.call()
        except errors:
            failures += 1
            assert failures < 100, "it never succeeds"
            assert case.observe() == before, f"failure {failures} has changed something"
            case.call()
        else:
            assert case.observe() == after
            return failures
        assert case.observe() == after
        case.go_on()
        assert case.observe() == after_and_on


def exhaust_all() -> dict[str, int]:
    """Run the calls that allocate arrays."""
    # An OpenMP runtime that cannot start threads would end the process.
    fusedadam.set_num_threads(1)
    failures = {}
    for name, call in CALLS.items():
        if call.least is not None:
            shapes = [((1024, MIB // 4096), "float32")] * (2 if "frozen" in name else 1)
            failures[name] = exhaust(functools.partial(Scene, call, shapes))
            assert failures[name] >= call.least, f"{name}: {failures[name]} failures"
    return failures
