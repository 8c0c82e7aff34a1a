# SPDX-License-Identifier: MIT
"""Parameters, gradients and moments in files that need not fit into memory (`numpy.memmap`)."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import fusedadam
import numpy as np
import oracle
from helpers import Array, bits, values

# The size of the parameter. More than the page cache tests more but takes longer.
BYTES = int(os.environ.get("FUSEDADAM_MEMMAP_BYTES", str(16 << 20)))

# All rows are equal, so that the oracle needs only one.
_ROW = 1 << 16
_PIECE = 16


def mapped(path: Path, rows: int, row: Array) -> Array:
    """Create a file of equal rows, written in pieces, and return its memory map."""
    with path.open("wb") as file:
        for first in range(0, rows, _PIECE):
            file.write(row.tobytes() * min(_PIECE, rows - first))
    return np.memmap(path, dtype=row.dtype, mode="r+", shape=(rows, row.size))


def evict(array: Array) -> None:
    """Write back a map and drop its pages, so that later reads come from the file."""
    array.flush()  # type: ignore[attr-defined]
    if hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    if hasattr(os, "posix_fadvise"):
        with Path(array.filename).open("rb") as file:  # type: ignore[attr-defined]
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def assert_rows_are(array: Array, row: Array, what: str) -> None:
    expected = bits(row)
    for first in range(0, len(array), _PIECE):
        piece = bits(np.asarray(array[first : first + _PIECE]))
        assert np.all(piece == expected), f"{what}: rows from {first} on"


def test_everything_in_files(tmp_path: Path, rng: np.random.Generator) -> None:
    # An optimizer's moments are in memory. The function takes the caller's.
    rows = max(1, BYTES // (16 * _ROW))
    p, g = (values(rng, _ROW, "float32") for _ in range(2))
    zeros = np.zeros(_ROW, np.float32)
    reference = oracle.OracleAdam([p])
    param, grad, m, v = (
        mapped(tmp_path / name, rows, row)
        for name, row in {"param": p, "grad": g, "m": zeros, "v": zeros}.items()
    )
    for step in (1, 2):
        fusedadam.adam_step(param, grad, m, v, step=step)
        reference.step([g])
        for array in (param, grad, m, v):
            evict(array)
    del param, m, v
    for name, expected in {"param": reference.params, "m": reference.m, "v": reference.v}.items():
        read = np.memmap(tmp_path / name, np.float32, "r", shape=(rows, _ROW))
        assert_rows_are(read, expected[0], name)
