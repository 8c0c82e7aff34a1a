# SPDX-License-Identifier: MIT
"""Arrays next to inaccessible pages: one byte read or written too far ends the process.

The remaining bytes of the accessible pages hold canaries, which detect writes on the other side.
Linux and macOS protect memory through `mprotect`. On Windows, an array has only the canaries on
both sides, so only writes are found.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Final, Literal, TypeAlias

import numpy as np
from helpers import Array

Place: TypeAlias = Literal["end", "start"]
Order: TypeAlias = Literal["C", "F"]
PLACES: Final[tuple[Place, Place]] = ("end", "start")

PROTECTS: Final = sys.platform != "win32"

_PAGE: Final = mmap.PAGESIZE
_CANARY: Final = 0xA5
_PROT_NONE: Final = 0


class Guarded:
    """A copy of an array that ends just before an inaccessible page, or begins just after one.

    For placement "end", the distance to a 64-byte boundary depends on the number of bytes and may
    be any multiple of the item size. For "start", it is 0.
    """

    def __init__(self, values: Array, place: Place = "end", order: Order = "C") -> None:
        values = np.asarray(values)
        inside = max(1, -(-values.nbytes // _PAGE)) * _PAGE
        self._memory = _anonymous(inside + 2 * _PAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)[_PAGE : _PAGE + inside]
        self._bytes[...] = _CANARY
        address = self._bytes.ctypes.data
        _protect(address - _PAGE)
        _protect(address + inside)
        self._start = inside - values.nbytes if place == "end" else 0
        self._stop = self._start + values.nbytes
        self.array: Array = np.ndarray(
            values.shape,
            values.dtype,
            buffer=self._memory,
            offset=_PAGE + self._start,
            order=order,
        )
        self.array[...] = values

    def assert_canaries_alive(self) -> None:
        """Fail if a byte outside the array, on its pages, has changed."""
        assert (self._bytes[: self._start] == _CANARY).all(), "written before the array's start"
        assert (self._bytes[self._stop :] == _CANARY).all(), "written past the array's end"


def _anonymous(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Private, so that a forked child gets a copy, as with the memory of any other array.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _protect(page: int) -> None:
    if sys.platform == "win32":
        return
    if _libc.mprotect(page, _PAGE, _PROT_NONE) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if sys.platform != "win32":
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
