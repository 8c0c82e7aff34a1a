# SPDX-License-Identifier: MIT
"""Read safetensors files from untrusted sources.

The safetensors library maps files into memory, so a file that is truncated while mapped, or a disk
error, kills the process with a signal. It also parses a header of any size, and parsed JSON can
take a hundred times the memory of its text. This module reads from a single descriptor, validates
everything it uses, and lets the caller limit the size of the header.
"""

from __future__ import annotations

import json
import math
import os
import stat
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fusedadam.arrays import Array, dtype_named

if TYPE_CHECKING:
    from io import BufferedReader
    from types import TracebackType

    from typing_extensions import Self

# As the format names them: https://github.com/huggingface/safetensors#format
DTYPES: Final = {
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "int8": "I8",
    "int16": "I16",
}
_ITEM_SIZES: Final = {"F32": 4, "F64": 8, "BF16": 2, "I8": 1, "I16": 2}

_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the format
_MAX_DIGITS: Final = 20  # of 2**64 - 1, and of -2**63 with its sign
_MAX_DIMENSIONS: Final = 64  # NumPy's limit


def refused(path: str, reason: str) -> ValueError:
    """Return the error for a file that is not a complete checkpoint."""
    return ValueError(
        f"path must be that of a complete fusedadam checkpoint; {reason}. Received: {path!r}"
    )


class Entry(NamedTuple):
    """The header's entry for one tensor; its offsets lie within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file with a validated header; a header beyond `max_header_bytes` is not read."""

    metadata: dict[str, str]
    entries: dict[str, Entry]

    def __init__(self, path: str, max_header_bytes: int) -> None:
        self._path = path
        self._file = _opened(path)
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = self._header_length(size, max_header_bytes)
            header = self._file.read(length)
            self._require(len(header) == length)
            self._data = 8 + length
            try:
                self.metadata, self.entries, whole = _parsed_header(header)
            except (ValueError, RecursionError) as error:
                raise refused(path, f"this file is damaged: {error}") from error
            whole += self._data
            if size < whole:
                raise refused(path, f"this file is truncated: it has {size} bytes of {whole}")
            if size > whole:
                raise refused(path, "this file is damaged: it has data after its last tensor")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Array:
        """Read the tensor of this name, which must be of one of `DTYPES`, into a new array."""
        entry = self.entries[name]
        dtype = next(name for name, named in DTYPES.items() if named == entry.dtype)
        array: Array = np.empty(entry.shape, dtype_named(dtype))
        self._file.seek(self._data + entry.begin)
        self._require(self._file.readinto(array.reshape(-1).view(np.uint8).data) == array.nbytes)
        return array

    def _header_length(self, size: int, max_header_bytes: int) -> int:
        # Check the size before reading: some system files report a size of 0, and block on read.
        start = self._file.read(9) if size >= 9 else b""
        length = int.from_bytes(start[:8], "little")
        if start and (length > _MAX_HEADER_BYTES or start[8:] != b"{"):
            raise refused(self._path, "this is no safetensors file")
        if size < 9 or size < 8 + length:
            raise refused(self._path, f"this file is truncated, in its header: it has {size} bytes")
        if length > max_header_bytes:
            raise refused(
                self._path,
                f"its header, of {length} bytes, is longer than the state of these params needs",
            )
        self._file.seek(8)
        return length

    def _require(self, got_all: bool) -> None:
        if not got_all:
            raise refused(self._path, "this file was truncated while it was read")


def _opened(path: str) -> BufferedReader:
    """Open a regular file and refuse anything else: a pipe may never end."""
    # Check the descriptor and not the path, which could be replaced in between.
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"path must be that of a regular file. Received: {path!r}")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    # O_NONBLOCK: do not wait for the writer of a pipe. O_NOCTTY: do not acquire a terminal.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _parsed_header(header: bytes) -> tuple[dict[str, str], dict[str, Entry], int]:
    """Return the metadata, the entries by name, and the total size of the tensors in bytes."""
    parsed = strict_json(header.decode())
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("'__metadata__' contains a value that is not a string")
    entries = {name: _entry(described) for name, described in parsed.items()}
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    _require_no_gap(spans)
    return metadata, entries, spans[-1][1] if spans else 0


def _require_no_gap(spans: list[tuple[int, int]]) -> None:
    end = 0
    for begin, next_end in spans:
        if begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = next_end


def _entry(described: Any) -> Entry:
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header has an entry that is not a tensor")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise ValueError("its header has an entry that is not a tensor")
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError("its header has a tensor with an invalid shape or invalid offsets")
    entry = Entry(dtype, tuple(shape), *offsets)
    # Tensors of other dtypes are never read.
    if dtype in _ITEM_SIZES:
        nbytes = math.prod(entry.shape) * _ITEM_SIZES[dtype]
        if nbytes != entry.end - entry.begin:
            raise ValueError("its header has a tensor whose size does not match its shape")
    return entry


def _are_sizes(values: Any) -> bool:
    # bool is a subclass of int.
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def strict_json(text: str) -> Any:
    """Parse JSON; refuse duplicate names, lone surrogates and numbers that are not finite."""
    return json.loads(
        text,
        object_pairs_hook=_unique,
        parse_int=_integer,
        parse_float=_nearest_float,
        parse_constant=_no_number,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Encoding fails on a lone surrogate, which JSON can write as an escape.
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name stands twice")
    return unique


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS or digits == "-0":
        raise ValueError("a number is no integer of 64 bits")
    return int(digits)


def _nearest_float(digits: str) -> float:
    # Python's parser depends on the caller's rounding mode: its result may not be the nearest.
    read = float(digits)
    if read == 0 or math.isinf(read):
        return read
    exact = Fraction(digits)
    near = (read, math.nextafter(read, -math.inf), math.nextafter(read, math.inf))
    return min(filter(math.isfinite, near), key=lambda x: abs(Fraction(x) - exact))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
