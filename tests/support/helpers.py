# SPDX-License-Identifier: MIT
"""Bitwise comparison, where arrays lie, what they contain, and what runs a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import fusedadam
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

FLOATS = ("float32", "float64")
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_CANARY = 0xA5


def bits(x: Array) -> Array:
    """Return the bits of a float array, with one pattern for every NaN.

    The sign and payload of a NaN depend on the CPU and are not part of the contract.
    """
    plain = np.ascontiguousarray(x).reshape(np.shape(x))
    return np.where(np.isnan(plain), plain.dtype.type(np.nan), plain).view(_BITS[plain.itemsize])


def assert_same_bits(actual: Array, expected: Array, what: str = "array") -> None:
    """Fail unless dtype, shape and bits are equal. All NaNs are equal."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} != {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    if actual.dtype.kind not in "fV":  # V: bfloat16
        np.testing.assert_array_equal(actual, expected, err_msg=what)
        return
    differs = np.flatnonzero(bits(actual) != bits(expected))
    if differs.size:
        i = int(differs[0])
        a, e = actual.ravel()[i], expected.ravel()[i]
        message = (
            f"{what}: {differs.size} of {actual.size} elements differ, first at flat index {i}: "
            f"{float(a)!r} ({float(a).hex()}) != {float(e)!r} ({float(e).hex()})"
        )
        raise AssertionError(message)


def assert_all_same_bits(
    actual: Sequence[Array], expected: Sequence[Array], what: str = "arrays"
) -> None:
    """Apply `assert_same_bits` to each pair of two lists of equal length."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} arrays != {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"{what}[{i}]")


class Placed:
    """A copy of an array, `offset` elements past a 64-byte boundary, between canaries."""

    def __init__(self, values: Array, offset: int = 0) -> None:
        itemsize = values.dtype.itemsize
        self._buffer = np.full(values.nbytes + offset * itemsize + 3 * 64, _CANARY, dtype=np.uint8)
        boundary = -self._buffer.ctypes.data % 64
        self._start = boundary + 64 + offset * itemsize
        self._stop = self._start + values.nbytes
        inside = self._buffer[self._start : self._stop].view(values.dtype)
        self.array: Array = inside.reshape(values.shape)
        self.array[...] = values

    def assert_canaries_alive(self) -> None:
        """Fail if a byte before or after the array has changed."""
        assert np.all(self._buffer[: self._start] == _CANARY), "written before the array's start"
        assert np.all(self._buffer[self._stop :] == _CANARY), "written past the array's end"


@contextlib.contextmanager
def running(*, isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """Force an instruction set or a thread count, and restore the previous one."""
    before = fusedadam.active_isa(), fusedadam.get_num_threads()
    try:
        if isa is not None:
            fusedadam.set_isa(isa)
        if threads is not None:
            fusedadam.set_num_threads(threads)
        yield
    finally:
        fusedadam.set_isa(before[0])
        fusedadam.set_num_threads(before[1])


def misaligned(a: Array) -> Array:
    placed: Array = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    placed[...] = a
    assert not placed.flags.aligned
    return placed


def read_only(a: Array) -> Array:
    frozen: Array = a.copy()
    frozen.flags.writeable = False
    return frozen


def values(rng: np.random.Generator, shape: int | tuple[int, ...], dtype: str) -> Array:
    """Draw normal numbers over 24 binary orders of magnitude, a tenth of them zero.

    With a single scale, a sum or quotient rounded in a wider type would go unnoticed.
    """
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-16, 8, shape))
    return np.asarray(np.where(rng.random(shape) < 0.1, 0.0, x), dtype=dtype)


def state(
    rng: np.random.Generator, shape: int | tuple[int, ...], dtype: str
) -> tuple[Array, Array, Array, Array]:
    """Draw ``(p, g, m, v)`` as in the middle of a training."""
    p, g, m = (values(rng, shape, dtype) for _ in range(3))
    v = values(rng, shape, dtype)
    return p, g, m, np.asarray(v * v)


def halving(iterations: int) -> float:
    """A learning rate schedule that can be imported by name."""
    return 0.25 * 0.5**iterations
