# SPDX-License-Identifier: MIT
"""Reading a safetensors file that anybody may have made.

Not by the safetensors library, which maps files into memory: where one is cut off meanwhile, or its
disk fails, the process dies by a signal. It also reads whatever header a file has, and a short text
in JSON can be a hundred times its length in memory. Here all bytes come by `read` from one
descriptor, nothing is believed that was not checked, and the caller limits the header.
"""

from __future__ import annotations

import json
import math
import os
import stat
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fusedadam.arrays import Array

if TYPE_CHECKING:
    from io import BufferedReader
    from types import TracebackType

    from typing_extensions import Self

# As the format names them: https://github.com/huggingface/safetensors#format
DTYPES: Final = {"float32": "F32", "float64": "F64"}
_NUMPY_DTYPES: Final = {named: np.dtype(name) for name, named in DTYPES.items()}

# The limit of the format; more is no header.
_MAX_HEADER_BYTES: Final = 100_000_000
# Those of 2**64, or of -2**63.
_MAX_DIGITS: Final = 20
# NumPy's limit.
_MAX_DIMENSIONS: Final = 64


def refused(path: str, reason: str) -> ValueError:
    """What to raise where a file is no checkpoint, or no whole one."""
    return ValueError(
        f"path must be that of a whole checkpoint of fusedadam; {reason}. Received: {path!r}"
    )


class Entry(NamedTuple):
    """What the header says of one tensor. The bytes are there, and as many as it needs."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file whose header was read and checked.

    Parameters
    ----------
    path : str
        The file.
    max_header_bytes : int
        Longer headers are not read: the caller knows how many tensors to expect.
    """

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
                raise refused(path, "this file is damaged: something follows its last tensor")
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
        """A new array of what the file has under this name; only float32 and float64."""
        entry = self.entries[name]
        array: Array = np.empty(entry.shape, _NUMPY_DTYPES[entry.dtype])
        self._file.seek(self._data + entry.begin)
        self._require(self._file.readinto(array.reshape(-1).view(np.uint8).data) == array.nbytes)
        return array

    def _header_length(self, size: int, max_header_bytes: int) -> int:
        # By its size, before anything is read: some files of the system's have none, and block.
        start = self._file.read(9) if size >= 9 else b""
        length = int.from_bytes(start[:8], "little")
        if start and (length > _MAX_HEADER_BYTES or start[8:] != b"{"):
            raise refused(self._path, "this is no safetensors file")
        if size < 9 or size < 8 + length:
            raise refused(self._path, f"this file is truncated, in its header: it has {size} bytes")
        if length > max_header_bytes:
            raise refused(
                self._path,
                f"its header, of {length} bytes, is longer than the state of these params makes it",
            )
        self._file.seek(8)
        return length

    def _require(self, got_all: bool) -> None:
        if not got_all:
            raise refused(self._path, "this file was truncated while it was read")


def _opened(path: str) -> BufferedReader:
    """Open a regular file and nothing else: a pipe may never end."""
    # The descriptor is looked at, not the path, which may get another file meanwhile.
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"path must be that of a regular file. Received: {path!r}")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    # Where the system has them: not for the other end of a pipe; and no terminal becomes ours.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _parsed_header(header: bytes) -> tuple[dict[str, str], dict[str, Entry], int]:
    """The metadata, the tensors by name, and the number of bytes of all of them."""
    parsed = strict_json(header.decode())
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("'__metadata__' has something else than texts")
    entries = {name: _entry(described) for name, described in parsed.items()}
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    _require_no_gap(spans)
    return metadata, entries, spans[-1][1] if spans else 0


def _require_no_gap(spans: list[tuple[int, int]]) -> None:
    """One after the other, without a byte twice or unused."""
    end = 0
    for begin, next_end in spans:
        if begin != end:
            raise ValueError("its tensors overlap, or leave a hole")
        end = next_end


def _entry(described: Any) -> Entry:
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header has something else than tensors")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise ValueError("its header has something else than tensors")
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError("its header has a tensor that cannot be")
    entry = Entry(dtype, tuple(shape), *offsets)
    # Of other dtypes none is ever read.
    if dtype in _NUMPY_DTYPES:
        nbytes = math.prod(entry.shape) * _NUMPY_DTYPES[dtype].itemsize
        if nbytes != entry.end - entry.begin:
            raise ValueError("its header has a tensor of other bytes than its shape needs")
    return entry


def _are_sizes(values: Any) -> bool:
    # bool is an int too.
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def strict_json(text: str) -> Any:
    """As `json.loads`, but of objects whose names stand once, texts of whole characters, and finite numbers."""
    return json.loads(
        text,
        object_pairs_hook=_unique,
        parse_int=_integer,
        parse_float=_nearest_float,
        parse_constant=_no_number,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # An escape of JSON can be half a character, which no other program would take.
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
    # Python reads by arithmetic in the caller's rounding mode, which may end beside the nearest one.
    read = float(digits)
    if read == 0 or math.isinf(read):
        return read
    exact = Fraction(digits)
    near = (read, math.nextafter(read, -math.inf), math.nextafter(read, math.inf))
    return min(filter(math.isfinite, near), key=lambda x: abs(Fraction(x) - exact))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
