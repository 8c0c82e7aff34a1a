# SPDX-License-Identifier: MIT
"""Memory and files that are never released, counted and not estimated."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bad_settings import Errors

# For each kind of call. A few hundred are enough to find a leak in every call.
CALLS = int(os.environ.get("FUSEDADAM_LEAK_CALLS", "500"))

# The smallest allocation of malloc.
_LEAST_BYTES = 16


class _Mallinfo2(ctypes.Structure):
    # fmt: off
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]
    # fmt: on


class Memory(NamedTuple):
    """Blocks of Python's allocator, bytes of malloc, pages of the process, and open files."""

    blocks: int
    malloc_bytes: int
    tracked_objects: int
    pages: int
    files: int


def _malloc_bytes() -> int:
    """The bytes allocated by malloc, if it can report them (glibc 2.33 and later)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def memory() -> Memory:
    """What is in use after a garbage collection."""
    gc.collect()
    blocks, objects = sys.getallocatedblocks(), len(gc.get_objects())
    statm, descriptors = Path("/proc/self/statm"), Path("/proc/self/fd")
    # The pages of the address space include an optimizer's moments.
    pages = int(statm.read_text("ascii").split()[0]) if statm.exists() else 0
    files = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    return Memory(blocks, _malloc_bytes(), objects, pages, files)


def assert_flat(call: Callable[[], object], kept: Iterable[Any] = (), calls: int = CALLS) -> None:
    """Fail if every second call leaves something, or if these objects gain references.

    A leak is at least one block of Python's allocator or 16 bytes of malloc's memory. Caches that
    fill up are not leaks: a leak repeats.
    """
    kept = list(kept)
    gc.collect()
    gc.freeze()  # skip existing objects, whose traversal would take longer than the calls
    try:
        for _ in range(max(10, calls // 10)):
            call()
        for _ in range(3):
            grown = _grown(call, kept, calls)
            if _is_flat(grown, calls):
                return
    finally:
        gc.unfreeze()
    raise AssertionError(grown)


def _grown(call: Callable[[], object], kept: list[Any], calls: int) -> Memory:
    references = [sys.getrefcount(one) for one in kept]
    before = memory()
    for _ in range(calls):
        call()
    after = memory()
    assert [sys.getrefcount(one) for one in kept] == references
    return Memory(*(a - b for a, b in zip(after, before, strict=True)))


def _is_flat(grown: Memory, calls: int) -> bool:
    limit = calls // 2
    return (
        grown.blocks < limit
        and grown.tracked_objects < limit
        and grown.malloc_bytes < _LEAST_BYTES * limit
        # Python's allocator and malloc fluctuate by up to a megabyte.
        and grown.pages < max(3 * calls // 4, 768)
        and grown.files < min(limit, 5)
    )


def expect(error: Errors, call: Callable[[], object]) -> Callable[[], None]:
    """A call that must fail with this error."""

    def fails() -> None:
        try:
            call()
        except error:
            return
        raise AssertionError(f"no {error}")

    return fails


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
