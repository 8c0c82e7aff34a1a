# SPDX-License-Identifier: MIT
"""Parameters, gradients and moments in files (`numpy.memmap`)."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from fresh_python import output_of
from fusedadam import Adam
from helpers import Array, bits, values

# The size of the parameter. More than the page cache tests more but takes longer.
BYTES = int(os.environ.get("FUSEDADAM_MEMMAP_BYTES", str(16 << 20)))

# All rows are equal, so that the oracle needs only one.
_ROW = 1 << 16
_PIECE = 16


def mapped(path: Path, rows: int, row: Array, mode: Any = "r+") -> Array:
    """Create a file of equal rows, written in pieces, and return its memory map."""
    with path.open("wb") as file:
        for first in range(0, rows, _PIECE):
            file.write(row.tobytes() * min(_PIECE, rows - first))
    return np.memmap(path, dtype=row.dtype, mode=mode, shape=(rows, row.size))


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


def test_parameter_and_gradient_in_files(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = max(1, BYTES // (4 * _ROW))
    p, g = (values(rng, _ROW, "float32") for _ in range(2))
    reference = oracle.OracleAdam([p])
    param = mapped(tmp_path / "param", rows, p)
    grad = mapped(tmp_path / "grad", rows, g, "r")
    adam = Adam()
    for _ in range(2):
        adam.apply_gradients([(grad, param)])
        reference.step([g])
        evict(param)
    assert_rows_are(param, reference.params[0], "param")
    for moment, expected in zip(adam.weights[1:], [*reference.m, *reference.v], strict=True):
        assert_rows_are(moment, expected[0] if expected.ndim > 1 else expected, "moment")

    # Another process reads the file and not this process's memory.
    code = f"""
        import numpy as np
        p = np.memmap({str(tmp_path / "param")!r}, dtype="float32", mode="r", shape={param.shape})
        print(p[0].tobytes().hex() == p[-1].tobytes().hex(), p[-1, :4].tobytes().hex())
    """
    same, first = output_of(code).split()
    assert same == "True"
    assert first == reference.params[0][:4].tobytes().hex()
    logging.getLogger(__name__).info("a parameter of %.0f MiB in a file", param.nbytes / 2**20)


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


def test_a_file_made_by_the_map(tmp_path: Path) -> None:
    param = np.memmap(tmp_path / "p", np.float64, "w+", shape=(1000,))
    Adam(lr=0.5).apply_gradients([(np.ones(1000), param)])
    param.flush()
    expected = oracle.OracleAdam([np.zeros(1000)], lr=0.5)
    expected.step([np.ones(1000)])
    assert (tmp_path / "p").read_bytes() == expected.params[0].tobytes()


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_map_that_does_not_write_to_its_file(tmp_path: Path, mode: str) -> None:
    param = mapped(tmp_path / "p", 1, np.ones(64, np.float32), mode)
    before = (tmp_path / "p").read_bytes()
    pairs = [(np.ones((1, 64), np.float32), param)]
    if mode == "r":
        with pytest.raises(ValueError, match=r"params\[0\] must be writeable"):
            Adam().apply_gradients(pairs)
    else:  # copy on write
        Adam().apply_gradients(pairs)
        assert np.all(param < 1)
    assert (tmp_path / "p").read_bytes() == before
