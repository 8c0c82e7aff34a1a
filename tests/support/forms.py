# SPDX-License-Identifier: MIT
"""Forms in which gradients may be given: layouts, dtypes, and objects that are not arrays."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from helpers import Array, misaligned, read_only

Form: TypeAlias = Callable[[Array], Any]


def strided(a: Array) -> Array:
    wide = np.full((2 * a.shape[0], 3 * a.shape[1]), np.nan, a.dtype)
    wide[1::2, ::3] = a
    return wide[1::2, ::3]


def misaligned_and_strided(a: Array) -> Array:
    records = np.zeros(a.shape, np.dtype([("tag", "i1"), ("g", a.dtype)]))  # packed, as in C files
    records["g"] = a
    packed: Array = records["g"]
    assert not packed.flags.aligned
    return packed


def cast(dtype: Any, factor: float = 1.0, *, positive: bool = False) -> Form:
    def form(g: Array) -> Array:
        wide = g.astype("float64") * factor
        return np.asarray((np.abs(wide) if positive else wide).astype(dtype))

    return form


class Tagged(np.ndarray[Any, np.dtype[Any]]):
    """A subclass that a step must preserve and not replace by its base class."""


class ArrayLike:
    """Another library's array with NumPy 2's protocol. Like jax's arrays, it is read-only."""

    def __init__(self, a: Array) -> None:
        self._a = a

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        a = self._a.astype(dtype or self._a.dtype, copy=bool(copy))
        a.flags.writeable = False
        return a


class OldArrayLike:
    """The same with the protocol of NumPy 1."""

    def __init__(self, a: Array) -> None:
        self._a = a

    def __array__(self, dtype: Any = None) -> Array:
        return self._a if dtype is None else self._a.astype(dtype)


def buffer_like(a: Array) -> Any:
    """Return an object that only has `__array_interface__`."""
    return SimpleNamespace(__array_interface__=a.__array_interface__, memory=a)


LAYOUTS: dict[str, Form] = {
    "C order": np.copy,
    "Fortran order": np.asfortranarray,
    "strided": strided,
    "rows apart": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "row reversed": lambda a: a[:, ::-1].copy()[:, ::-1],
    "misaligned": misaligned,
    "misaligned and strided": misaligned_and_strided,
    "read-only": read_only,
    "broadcast from a row": lambda a: np.broadcast_to(a[:1].copy(), a.shape),
    "broadcast from a column": lambda a: np.broadcast_to(a[:, :1].copy(), a.shape),
    "broadcast from a scalar": lambda a: np.broadcast_to(a[0, 0].copy(), a.shape),
    "subclass": lambda a: a.view(Tagged),
}
# All numeric dtypes that NumPy casts to float32 and float64 by the rule `same_kind`, with values
# that are rounded.
CASTS: dict[str, Form] = {
    **{d: cast(d) for d in ("float16", "float32", "float64", "longdouble", "bfloat16", "bool")},
    **{d: cast(d) for d in (">f4", ">f8", ">f2")},
    **{d: cast(d, 2.0**20) for d in ("int8", "int32", "int64", ">i8")},
    **{d: cast(d, 2.0**20, positive=True) for d in ("uint8", "uint64")},
    "odd integers beyond 2**53": lambda g: (g * 2**20).astype("int64") * 2 + 2**60 + 1,
    "float64 in Fortran order": lambda a: np.asfortranarray(a, "float64"),
    "float16 in Fortran order": lambda a: np.asfortranarray(a.astype("float16")),
    "strided bfloat16": lambda a: strided(a.astype(ml_dtypes.bfloat16)),
    "reversed float16": lambda a: a.astype("float16")[::-1].copy()[::-1],
    "read-only bfloat16": lambda a: read_only(a.astype("bfloat16")),
    "lists": lambda g: g.tolist(),
    "lists of integers": lambda g: g.astype("int64").tolist(),
    "lists of arrays": lambda g: list(g.astype("float64")),
    "of another library": ArrayLike,
    "of another library, by NumPy 1's protocol": OldArrayLike,
    "of another library, a buffer": buffer_like,
}
FORMS = LAYOUTS | CASTS
