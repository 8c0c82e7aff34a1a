# SPDX-License-Identifier: MIT
"""The oracle of storage formats against exact arithmetic, because the kernels are compared with it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import storage_oracle as storage
from storage_oracle import BFLOAT16, FLOAT16

Array: TypeAlias = npt.NDArray[Any]

DITHERS = np.arange(2**16)
NANS = {BFLOAT16: 0x7FC0, FLOAT16: 0x7E00}
ROUND = {BFLOAT16: storage.to_bfloat16, FLOAT16: storage.to_float16}
halves = pytest.mark.parametrize("half", ROUND, ids=str)

# The lower halves of float32 patterns: ends and ties of roundings to 24, 16 and 11 bits.
LOWER = [0, 1, 0x7F, 0x80, 0x81, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
# Every sign, exponent and upper mantissa, with each of them.
PATTERNS = storage.floats((np.arange(2**16)[:, None] << 16) + np.array(LOWER)).ravel()


def code(x: Array) -> Array:
    return x.view(f"uint{8 * x.dtype.itemsize}").astype(np.int64)


def same(actual: Array, expected: Array) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(code(actual), code(expected))


def below(x: Array, half: np.dtype[Any]) -> tuple[Array, Array]:
    """Return the codes of the 16-bit floats below |x|, and how far |x| is towards the next ones.

    Infinity counts as the next power of two. The results are exact in float64.
    """
    infinity = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00}[half]
    with np.errstate(invalid="ignore"):
        finite = np.arange(infinity).astype(np.uint16).view(half).astype(np.float64)
        table = np.append(finite, 2.0 ** np.ceil(np.log2(finite[-1])))
        magnitude = np.minimum(np.abs(x.astype(np.float64)), table[-1])
    k = np.searchsorted(table, magnitude, side="right") - 1
    gaps = np.append(np.diff(table), 1.0)
    return k, (magnitude - table[k]) / gaps[k]


# -- dithers ----------------------------------------------------------------------------------


def test_mixing_is_that_of_splitmix64() -> None:
    # The first numbers of the published generator from the seed 1234567.
    states = np.array([(1234567 + n * storage.GOLD) % 2**64 for n in (1, 2, 3)], np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert storage.mix64(states).tolist() == published


@pytest.mark.parametrize(("seed", "t"), [(0, 1), (0, 2), (12345, 1), (2**64 - 1, 2**53)])
def test_dithers_by_python_integers(seed: int, t: int) -> None:
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    gold = 0x9E3779B97F4A7C15
    index = [0, 1, 62, 63, 64, 65, 127, 128, 2**32 + 63, 2**40]
    expected = []
    for i in index:
        b = mix((mix((seed + t * gold) % 2**64) + i // 64 * gold) % 2**64)
        a = (b % 2**32 + i % 64 * 0xC13F91E1) % 2**32
        e = (b // 2**32 + i % 64 * 0x9E3779B9) % 2**32
        expected.append((a // 2**16, a % 2**16, e // 2**16))
    assert list(zip(*storage.dither(seed, t, np.array(index)), strict=True)) == expected
    assert [*storage.dither(seed, t, np.array(2**40))] == [*expected[-1]]


# -- roundings --------------------------------------------------------------------------------


@halves
def test_every_number_is_widened_exactly(half: np.dtype[Any]) -> None:
    x = np.arange(2**16).astype(np.uint16).view(half)
    wide = storage.widen(x)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide, x.astype(np.float64))
    back = np.where(np.isnan(wide), NANS[half], code(x))
    np.testing.assert_array_equal(code(ROUND[half](wide)), back)
    np.testing.assert_array_equal(code(ROUND[half](wide, DITHERS)), back)


@halves
def test_nearest_takes_the_even_one_of_a_tie(half: np.dtype[Any]) -> None:
    k, part = below(PATTERNS, half)
    expected = k + ((part > 0.5) | ((part == 0.5) & (k % 2 == 1))) + 0x8000 * np.signbit(PATTERNS)
    is_nan = np.isnan(PATTERNS)
    rounded = ROUND[half](PATTERNS)
    np.testing.assert_array_equal(code(rounded), np.where(is_nan, NANS[half], expected))
    with np.errstate(all="ignore"):
        same(rounded[~is_nan], PATTERNS[~is_nan].astype(half))


def edges(rng: np.random.Generator) -> Array:
    """Return numbers of all sizes, and those around the ends of the ranges of 16-bit floats."""
    powers = [2.0**e for e in (-149, -40, -37, -25, -24, -14, 16)]
    ends = np.array([0, *powers, 3 * 2.0**-26, 65504, 65535.9, 3.4e38, np.inf], np.float32)
    others = np.exp2(rng.uniform(-30, 17, 10)).astype(np.float32)
    others[::2] *= -1
    return np.concatenate([ends, -np.nextafter(ends, np.float32(0)), 0.997 * ends, others])


@halves
def test_dithers_round_up_as_often_as_the_fraction_says(
    half: np.dtype[Any], rng: np.random.Generator
) -> None:
    digits = {BFLOAT16: 2**16, FLOAT16: 2**13}[half]
    x = edges(rng)
    k, part = below(x, half)
    for one, low, fraction in zip(x, k, part, strict=True):
        ups = code(ROUND[half](np.full(2**16, one), DITHERS)) - low - 0x8000 * np.signbit(one)
        assert set(ups) <= {0, 1}
        # Float16 below 2**-14 has digits after the dither's. They are cut off.
        assert ups.sum() == np.floor(fraction * digits) * (2**16 // digits)


# -- weights ----------------------------------------------------------------------------------


def test_sixteen_low_bits_are_exact() -> None:
    high, low = storage.split(PATTERNS, np.int16)
    is_nan = np.isnan(PATTERNS)
    same(storage.join(high, low), np.where(is_nan, storage.floats(np.array(0x7FC00000)), PATTERNS))
    is_tie = low == -0x8000
    same(high[~is_tie], storage.to_bfloat16(PATTERNS)[~is_tie])


def test_eight_low_bits_keep_24_bits_and_round_by_dithers(rng: np.random.Generator) -> None:
    for one in edges(rng):
        high, low = storage.split(np.full(2**16, one), np.int8, DITHERS)
        ups = (storage.bits(storage.join(high, low)) >> 8) - (storage.bits(one) >> 8)
        assert set(ups) <= {0, 1}
        assert ups.sum() == 256 * (storage.bits(one) & 0xFF)
    high, low = storage.split(PATTERNS, np.int8)
    joined = storage.join(high, low)
    expected = np.where(np.isnan(PATTERNS), 0x7FC00000, (code(PATTERNS) + 0x80) >> 8 << 8)
    np.testing.assert_array_equal(code(joined), expected)
    for d in (None, np.resize(DITHERS, joined.size)):  # what is exact is rounded by no dither
        again = storage.split(joined, np.int8, d)
        same(again[0], high)
        same(again[1], low)


# -- packed moments ---------------------------------------------------------------------------

WORDS = np.arange(2**16).astype(np.uint16).view(np.int16)
C, U = np.arange(2**16) & 511, np.arange(2**16) >> 9 & 63
IS_FROZEN = code(WORDS) == 0x8000


def value(c: Array, base: int) -> Array:
    """Return the numbers with these codes: 8 steps in each octave, in exact float64."""
    return np.asarray(np.ldexp(1 + (c + base) % 8 / 8, (c + base) // 8 - 127))


def test_every_word_decodes_exactly() -> None:
    m, v = storage.decode(WORDS)
    s = np.where(C == 0, 0, value(C, 695))
    assert (s[1], s[511]) == (2.0**-40 * 1.0, 2.0**23 * 1.75)
    ratio = value(U, 976) - 2.0**-5
    np.testing.assert_array_equal(v, np.where(IS_FROZEN, np.inf, s * s))
    np.testing.assert_array_equal(m, np.where(IS_FROZEN, 0, ratio * s * np.where(WORDS < 0, -1, 1)))
    assert (ratio.min(), ratio.max(), m.dtype.name, v.dtype.name) == (0, 7.46875, *["float32"] * 2)


def test_import_of_an_export_is_the_word() -> None:
    is_encodable = (WORDS == 0) | IS_FROZEN | ((C > 0) & ((WORDS > 0) | (U > 0)))
    w = WORDS[is_encodable]
    m, v = storage.decode(w)
    same(storage.encode(m, v), w)
    for d in (0, 0xFFFF):  # exact codes are rounded by no dither
        same(storage.encode(m, v, np.array(d), np.array(d)), w)


@pytest.mark.parametrize("d", [0, 0x8000, 0xFFFF])
@pytest.mark.parametrize(
    ("m", "v", "word"),
    [
        (0.0, 0.0, 0),
        (1.0, 0.0, 0),
        (-1.0, -0.0, 0),
        (-0.0, 2.0**-80, 1),
        (0.0, 1e-45, 1),  # below the codes, but never 0
        (0.0, 2.0**-126, 1),
        (0.0, 3.4e38, 511),
        (np.inf, 1.0, 63 << 9 | 321),
        (-8.0, 1.0, 0x8000 | 63 << 9 | 321),
        (np.nan, 1.0, 0x8000),
        (0.0, np.inf, 0x8000),
        (np.inf, np.nan, 0x8000),
        (np.nan, 0.0, 0x8000),
    ],
)
def test_word_of_special_moments(d: int, m: float, v: float, word: int) -> None:
    one, two = np.array([[m], [v]], np.float32)
    assert code(storage.encode(one, two, np.array(d), np.array(d))) == [word]


def test_codes_are_unbiased(rng: np.random.Generator) -> None:
    for _ in range(20):
        s = np.float32(np.exp2(rng.uniform(-39, 23)))
        root = np.sqrt(np.float32(s * s))
        zero = np.zeros(2**16, np.float32)
        c = code(storage.encode(zero, zero + s * s, None, DITHERS))
        assert c.max() - c.min() <= 1
        assert code(storage.encode(zero[:1], zero[:1] + s * s)) == np.median(c)
        # The dither lacks 4 of the 20 digits between two codes, which are an eighth apart at most.
        assert np.mean(value(c, 695)) == pytest.approx(root, rel=2.0**-19, abs=0)

        m = np.float32(rng.uniform(-7, 7) * s * rng.choice([1, 0.01]))
        w = storage.encode(zero + m, zero + s * s, DITHERS, np.full(2**16, rng.integers(2**16)))
        decoded = storage.decode(w)[0].astype(np.float64)
        assert len(set(w)) <= 2
        q = value(code(w)[:1] & 511, 695)[0]
        # The bias of 4 lacking digits of a step of r, and the roundings of m / q and r + 2**-5.
        assert np.mean(decoded) == pytest.approx(m, rel=0, abs=2.0**-18 * (abs(m) + q / 32))


# -- the optimizer ----------------------------------------------------------------------------


def test_exact_weights_are_the_float32_master(rng: np.random.Generator) -> None:
    start = np.asarray(rng.standard_normal(70), np.float32)
    options: dict[str, Any] = {"amsgrad": True, "weight_decay": 0.1, "clipnorm": 0.5}
    options |= {"use_ema": True, "ema_overwrite_frequency": 3, "loss_scale": "dynamic"}
    high, low = storage.split(start, np.int16)
    master = oracle.OracleAdam([start], **options)
    split = oracle.OracleAdam([high], low_bits="int16", seed=4, **options)
    split.low_bits, split.ema = [low], list(master.ema)
    for _ in range(8):
        g = storage.to_bfloat16(np.asarray(rng.standard_normal(70), np.float32))
        split.step([g])
        master.step([storage.widen(g)])
        same(storage.join(split.params[0], split.low_bits[0]), master.params[0])
        assert all(map(np.array_equal, split.weights(), master.weights()))


def test_parameter_without_packed_v_only_decays() -> None:
    # A gradient whose square underflows moves a float32 parameter by m / epsilon.
    g, p = np.full(1, 1e-30, np.float32), np.ones(1, np.float32)
    moved, still = (
        oracle.OracleAdam([p], weight_decay=0.5, lr=0.5, epsilon=1e-30, moments=moments)
        for moments in ("float32", "packed")
    )
    moved.step([g])
    still.step([g])
    assert moved.params[0] < still.params[0] == 0.75
    assert still.packed[0] == 0


def test_half_gradients_are_added_in_float32() -> None:
    # A sum in float16 would be infinite.
    g, p = np.full((2, 1), 60_000, np.float16), np.zeros((1, 1), np.float32)
    rows, mean = oracle.OracleAdam([p]), oracle.OracleAdam([p], gradient_accumulation_steps=2)
    rows.apply_sparse(np.array([0, 0]), g)
    mean.step([g[:1]])
    mean.step([g[1:]])
    assert rows.m[0] == np.float32(1 - 0.9) * np.float32(120_000)
    assert mean.m[0] == np.float32(1 - 0.9) * np.float32(60_000)
