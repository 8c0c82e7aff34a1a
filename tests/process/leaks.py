# SPDX-License-Identifier: MIT
"""What is allocated and not given back, counted and not estimated."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Of each kind of call. Whatever leaks once a call is found with a few hundred.
CALLS = int(os.environ.get("FUSEDADAM_LEAK_CALLS", "1000"))

# The least that malloc gives.
_LEAST_BYTES = 16


class _Mallinfo2(ctypes.Structure):
    # fmt: off
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]
    # fmt: on


class Memory(NamedTuple):
    """What is in use: pieces of Python's allocator, bytes of malloc, pages of both and others, files."""

    blocks: int
    malloc_bytes: int
    tracked_objects: int
    pages: int
    files: int


def _malloc_bytes() -> int:
    """Bytes that malloc has given out, where it can be asked: glibc 2.33 and later."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _proc(name: str) -> Path | None:
    path = Path("/proc/self") / name
    return path if path.exists() else None


def _pages() -> int:
    """Of the address space, where the moments of an optimizer are mapped."""
    statm = _proc("statm")
    return int(statm.read_text("ascii").split()[0]) if statm else 0


def _files() -> int:
    descriptors = _proc("fd")
    return len(list(descriptors.iterdir())) if descriptors else 0


def memory() -> Memory:
    """What is in use now, garbage collected."""
    gc.collect()
    return Memory(
        sys.getallocatedblocks(),
        _malloc_bytes(),
        len(gc.get_objects()),
        _pages(),
        _files(),
    )


def assert_flat(call: Callable[[], object], kept: Iterable[Any] = (), calls: int = CALLS) -> None:
    """Fail if something of each second call stays, or somebody has kept one of these objects.

    Each thing that stays is a piece of Python's allocator or at least 16 bytes of malloc's. Caches
    that fill are no leak: what leaks does so again.
    """
    kept = list(kept)
    gc.collect()
    gc.freeze()  # what there was before is not looked at again, which takes longer than the calls
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
        # Python's allocator and malloc come and go by a megabyte or less.
        and grown.pages < max(3 * calls // 4, 768)
        and grown.files < min(limit, 5)
    )


def expect(error: type[BaseException], call: Callable[[], object]) -> Callable[[], None]:
    """A call that must fail so."""

    def fails() -> None:
        try:
            call()
        except error:
            return
        raise AssertionError(f"no {error.__name__}")

    return fails


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
