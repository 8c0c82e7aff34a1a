# SPDX-License-Identifier: MIT
"""The reference for what is stored in less than 32 bits: dithers, roundings, splits and codes.

Integer arithmetic is in int64, where nothing here overflows and NumPy 1.26 and NumPy 2 promote
Python integers alike. Only the mixing of the dither wraps, in uint64. Stored words are built from
bit patterns, because a cast may change the payload of a NaN.

A dither of None means rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)

# The increment of splitmix64, and two odd constants that spread the 64 elements of a group.
GOLD = 0x9E3779B97F4A7C15
SPREAD_MOMENTS = 0xC13F91E1
SPREAD_WEIGHTS = 0x9E3779B9

NAN = 0x7FC00000
SMALLEST_NORMAL_FLOAT16 = 0x38800000  # the float32 bits of 2**-14

# Packed moments: a sign, 6 bits of |m| / s with 8 steps per octave, 9 bits of s = sqrt(v) likewise.
# Adding `R_BIAS` to the ratio makes its code linear near zero.
FROZEN = 0x8000
S_BASE, R_BASE = 695, 976
R_BIAS = np.float32(2.0**-5)
LARGEST_R = np.float32(7.46875)


# -- dithers ----------------------------------------------------------------------------------


class Dither(NamedTuple):
    """Numbers from 0 to 65,535, one of each kind per element."""

    m: Array
    v: Array
    weight: Array


@np.errstate(over="ignore")
def mix64(x: Array) -> Array:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood, 2014) to uint64 numbers."""
    U = np.uint64
    x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> U(31)))


@np.errstate(over="ignore")
def dither(seed: int, t: int, index: Array) -> Dither:
    """Return the dithers of step `t` for elements with these positions in the whole tensor."""
    index = np.asarray(index, np.uint64)
    key = mix64(np.array((seed + t * GOLD) % 2**64, np.uint64))
    block = mix64(key + (index >> np.uint64(6)) * np.uint64(GOLD))
    lane = (index & np.uint64(63)).astype(np.int64)
    low = (block & np.uint64(0xFFFFFFFF)).astype(np.int64)
    high = (block >> np.uint64(32)).astype(np.int64)
    a = (low + lane * SPREAD_MOMENTS) & 0xFFFFFFFF
    e = (high + lane * SPREAD_WEIGHTS) & 0xFFFFFFFF
    return Dither(a >> 16, a & 0xFFFF, e >> 16)


# -- bits, and the two 16-bit floats ----------------------------------------------------------


def bits(x: Array) -> Array:
    """Return the bits of float32 numbers, as int64, with one pattern for every NaN."""
    x = np.asarray(x)
    assert x.dtype == np.float32
    return np.where(np.isnan(x), NAN, x.view(np.uint32).astype(np.int64))


def floats(b: Array) -> Array:
    """Return the float32 numbers with these bits, of which the lowest 32 count."""
    return np.asarray(b).astype(np.uint32).view(np.float32)


def words(b: Array, dtype: Any) -> Array:
    """Return the lowest 16 bits as numbers of a 16-bit dtype."""
    return np.asarray(b).astype(np.uint16).view(dtype)


@np.errstate(invalid="ignore")
def widen(x: Array) -> Array:
    """Return 16-bit floats as float32, and other floats as they are."""
    if x.dtype == BFLOAT16:
        return floats(x.view(np.uint16).astype(np.int64) << 16)
    return x.astype(np.float32) if x.dtype == FLOAT16 else x


def to_bfloat16(x: Array, d: Array | None = None) -> Array:
    """Round float32 numbers: up if their lowest 16 bits and the dither carry."""
    b = bits(x)
    to_nearest_even = 0x7FFF + ((b >> 16) & 1)
    return words((b + (to_nearest_even if d is None else d)) >> 16, BFLOAT16)


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def to_float16(x: Array, d: Array | None = None) -> Array:
    """Round float32 numbers with 13 bits of the dither.

    Results below 2**-14 are multiples of 2**-24. There, whole multiples of 2**-37 decide.
    """
    b = bits(x)
    if d is None:
        rounded = x.astype(np.float16).view(np.uint16).astype(np.int64)
    else:
        magnitude = b & 0x7FFFFFFF
        is_small = magnitude < SMALLEST_NORMAL_FLOAT16
        normal = np.minimum(((magnitude + (d >> 3)) >> 13) - (112 << 10), 0x7C00)
        small = np.where(is_small, np.abs(x), np.float32(0)).astype(np.float64)
        fixed = (small * 2.0**37).astype(np.int64)
        rounded = np.where(is_small, (fixed + (d >> 3)) >> 13, normal) | ((b >> 16) & 0x8000)
    return words(np.where(b == NAN, 0x7E00, rounded), FLOAT16)


# -- weights ----------------------------------------------------------------------------------


def split(p: Array, low_bits: Any, d: Array | None = None) -> tuple[Array, Array]:
    """Split float32 into bfloat16 and low bits: int16, which is exact, or dithered int8."""
    if np.dtype(low_bits) == np.int16:
        y, shift = bits(p), 16
    else:
        y, shift = (bits(p) + (0x80 if d is None else d >> 8)) >> 8, 8
    high = (y + (1 << (shift - 1))) >> shift
    return words(high, BFLOAT16), np.asarray(y - (high << shift)).astype(low_bits)


def join(high: Array, low: Array) -> Array:
    """Return the float32 numbers that `split` has split.

    Low bits do not count where they would make a number NaN: a weight that was set to zero.
    """
    shift = 16 - 8 * low.dtype.itemsize
    high_word = high.view(np.uint16).astype(np.int64) << 16
    joined = floats(high_word + (low.astype(np.int64) << shift))
    return np.where(np.isnan(joined), floats(high_word), joined)


def load_weight(weight: Array, low: Array | None = None) -> Array:
    """Return a stored weight in the dtype of the arithmetic."""
    return widen(weight) if low is None else join(weight, low)


def store_weight(
    p: Array, dtype: Any, low_bits: Any = None, d: Array | None = None
) -> tuple[Array, Array | None]:
    """Return `p` as a weight of this dtype with its low bits, which are None if it has none."""
    if low_bits is not None:
        return split(p, low_bits, d)
    if dtype == BFLOAT16:
        return to_bfloat16(p, d), None
    return (to_float16(p, d) if dtype == FLOAT16 else p), None


# -- both moments in one word -----------------------------------------------------------------


def decode(word: Array) -> tuple[Array, Array]:
    """Return m and v of packed words. A frozen word has an infinite v and no m."""
    w = word.view(np.uint16).astype(np.int64)
    c, u = w & 511, (w >> 9) & 63
    s = np.where(c == 0, np.float32(0), floats((c + S_BASE) << 20))
    m = (floats((u + R_BASE) << 20) - R_BIAS) * s
    m = np.where(w >> 15 == 1, -m, m)
    is_frozen = w == FROZEN
    return np.where(is_frozen, np.float32(0), m), np.where(is_frozen, np.float32(np.inf), s * s)


@np.errstate(all="ignore")
def encode(m: Array, v: Array, dm: Array | None = None, ds: Array | None = None) -> Array:
    """Pack two float32 moments into int16 words.

    Only v = 0 has the code 0, so that no update divides by `epsilon` alone.
    """
    half = 0x8000
    s = np.sqrt(v)
    carry = 16 * (half if ds is None else ds) + 8
    c = np.clip(((bits(s) + carry) >> 20) - S_BASE, 1, 511)
    r = np.minimum(np.abs(m) / floats((c + S_BASE) << 20), LARGEST_R)
    carry = 16 * (half if dm is None else dm) + 8
    u = ((bits(r + R_BIAS) + carry) >> 20) - R_BASE
    sign = np.where(np.signbit(m) & (u != 0), 0x8000, 0)
    w = np.where(s == 0, 0, sign | (u << 9) | c)
    # A root of NaN is that of a NaN or a negative v.
    return words(np.where((s < np.inf) & ~np.isnan(m), w, FROZEN), np.int16)


# -- the state of one tensor ------------------------------------------------------------------


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the arithmetic of a parameter."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def moment_dtype(dtype: np.dtype[Any], moments: str) -> np.dtype[Any]:
    """Return the dtype in which the moments of a parameter are stored, unless they are packed."""
    in_16_bits = moments == "bfloat16" or (moments == "auto" and dtype.itemsize == 2)
    return BFLOAT16 if in_16_bits and dtype != np.float64 else compute_dtype(dtype)


def load(stored: Mapping[str, Array]) -> dict[str, Array]:
    """Return "params", "m", "v" and any "vhat" and "ema" of one tensor as the arithmetic sees them.

    `stored` also has any "low_bits", and "packed" instead of "m" and "v".
    """
    loaded = {name: widen(x) for name, x in stored.items() if name not in ("low_bits", "packed")}
    loaded["params"] = load_weight(stored["params"], stored.get("low_bits"))
    if "packed" in stored:
        loaded["m"], loaded["v"] = decode(stored["packed"])
    return loaded


def store_weight_like(
    p: Array, like: Mapping[str, Array], d: Dither | None = None
) -> dict[str, Array]:
    """Return the part of `store` for the parameter: "params" and any "low_bits"."""
    low_bits = like["low_bits"].dtype if "low_bits" in like else None
    weight, low = store_weight(p, like["params"].dtype, low_bits, None if d is None else d.weight)
    return {"params": weight} if low is None else {"params": weight, "low_bits": low}


def store(
    values: Mapping[str, Array], like: Mapping[str, Array], d: Dither | None = None
) -> dict[str, Array]:
    """Return the result of `load` as stored: rounded to the formats of the arrays of `like`.

    vhat is always rounded to nearest: stochastic rounding would move a maximum.
    """
    dithers = {} if d is None else {"m": d.m, "v": d.v}
    stored: dict[str, Array] = {}
    for name, old in like.items():
        if name == "params":
            stored |= store_weight_like(values[name], like, d)
        elif name == "packed":
            stored[name] = encode(values["m"], values["v"], dithers.get("m"), dithers.get("v"))
        elif old.dtype == BFLOAT16:
            stored[name] = to_bfloat16(values[name], dithers.get(name))
        elif name != "low_bits":
            stored[name] = values[name]
    return stored
