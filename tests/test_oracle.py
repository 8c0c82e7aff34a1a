# SPDX-License-Identifier: MIT
"""The oracle against numbers computed elsewhere, before the kernel is held to it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
from helpers import FLOATS, assert_same_bits, values

# -- power and the learning rate --------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.5, 0.1, 1 - 2**-53, 5e-324])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 10, 999, 1074, 1075, 1500, 1501, 2500, 6000])
def test_power_is_the_nearest_float(beta: float, t: int) -> None:
    exact = Fraction(beta) ** t
    result = oracle.power(beta, t)
    error = abs(Fraction(result) - exact)
    for neighbour in (math.nextafter(result, 0.0), math.nextafter(result, 1.0)):
        assert error <= abs(Fraction(neighbour) - exact)


def test_power_rounds_a_tie_to_even() -> None:
    # Half of the smallest subnormal: the even neighbour is zero.
    assert oracle.power(0.5, 1074) == 5e-324
    assert oracle.power(0.5, 1075) == 0.0


@pytest.mark.parametrize(
    ("beta", "t", "expected"),
    [
        (1 - 2**-53, 2**53, math.exp(-1)),
        (1 - 2**-53, 2**54, math.exp(-2)),
        (1 - 2**-40, 2**40, math.exp(-1)),
        (1 - 2**-30, 2**31 + 1, math.exp(-2)),
        (0.999, 1_000_000, 0.0),
        (0.9, 2**53, 0.0),
        (1e-300, 2**62, 0.0),
    ],
)
def test_power_of_a_long_training(beta: float, t: int, expected: float) -> None:
    assert oracle.power(beta, t) == pytest.approx(expected, rel=1e-8, abs=0.0)


def test_power_beyond_the_exact_range_multiplies_back() -> None:
    # beta**(2**k) by repeated squaring, in integers of 400 bits: a second way to the same float.
    beta, k, width = 1 - 2**-45, 47, 400
    fixed = int(Fraction(beta) * 2**width)
    for _ in range(k):
        fixed = fixed * fixed >> width
    assert oracle.power(beta, 2**k) == float(Fraction(fixed, 2**width))


def test_lr_t_of_the_first_step() -> None:
    assert oracle.lr_t(0.001, 0.9, 0.999, 1) == pytest.approx(0.001 * math.sqrt(0.001) / 0.1)


def test_lr_t_of_a_long_training_is_lr() -> None:
    assert oracle.lr_t(0.25, 0.9, 0.999, 10**6) == 0.25


def test_decay_leaves_the_first_step_whole() -> None:
    assert [oracle.decayed(0.5, 0.5, i) for i in range(3)] == [0.5, 0.5 * (1 / 1.5), 0.25]


# -- the step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "p0", "p1"),
    [
        (0.0, [0.99700001, 1.99700001], [2.99700007, 3.99700007]),
        (0.5, [0.99783334, 1.99783334], [2.99783339, 3.99783339]),
    ],
)
def test_three_steps_of_two_parameters(decay: float, p0: list[float], p1: list[float]) -> None:
    params = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    adam = oracle.OracleAdam(params, decay=decay)
    for _ in range(3):
        adam.step([np.array([0.1, 0.1]), np.array([0.01, 0.01])])
    np.testing.assert_allclose(adam.params, [p0, p1], rtol=0, atol=5e-9)
    np.testing.assert_allclose(adam.m[0], 0.0271, rtol=1e-14)
    np.testing.assert_allclose(adam.v[0], 2.997001e-05, rtol=1e-14)
    np.testing.assert_array_equal(params, [[1.0, 2.0], [3.0, 4.0]])


def test_three_steps_with_small_and_large_gradients() -> None:
    adam = oracle.OracleAdam([np.ones(4)])
    gradients = [[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0.3, 1e-8], [1e3, -1e-3, 0, 1e-8]]
    expected = [
        [0.9990000031622677, 1.0009999984188638, 0.9990000010540915, 1.0],
        [0.999052634623498, 1.000947366898775, 0.9980000017996333, 0.9999771896539448],
        [0.9984138267800025, 1.000908943061599, 0.9972269994779159, 0.999940450265042],
    ]
    for g, p in zip(gradients, expected, strict=True):
        adam.step([np.array(g)])
        # Half a unit in the last printed digit, and the rounding of a handful of operations.
        np.testing.assert_allclose(adam.params[0], p, rtol=0, atol=3e-16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_step_keeps_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, dtype)
    for result in oracle.adam_step(x, x, x, x, step=1):
        assert isinstance(result, np.ndarray)
        assert (result.dtype, result.shape) == (x.dtype, shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_step_is_rounded_once_per_operation(dtype: str) -> None:
    T = np.dtype(dtype).type
    p, g, m, v = (T(x) for x in (0.7, 0.3, -0.2, 0.05))
    m1 = T(T(T(0.9) * m) + T(T(1 - 0.9) * g))
    v1 = T(T(T(0.999) * v) + T(T(1 - 0.999) * T(g * g)))
    rate = T(oracle.lr_t(0.001, 0.9, 0.999, 7))
    p1 = T(p - T(T(rate * m1) / T(np.sqrt(v1) + T(1e-8))))
    actual = oracle.adam_step(*(np.array([x]) for x in (p, g, m, v)), step=7)
    for a, e in zip(actual, (p1, m1, v1), strict=True):
        assert_same_bits(a, np.array([e]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_moments_become_positive_zero(dtype: str) -> None:
    tiny = np.finfo(dtype).smallest_normal
    below, above = tiny, tiny / np.dtype(dtype).type(0.8)
    m = np.array([below, -below, above, -above, -0.0], dtype)
    zero = np.zeros_like(m)
    _, flushed, _ = oracle.adam_step(zero, zero, m, zero, step=1)
    _, kept, _ = oracle.adam_step(zero, zero, m, zero, step=1, flush_denormals=False)
    assert_same_bits(flushed, np.where(np.abs(kept) < tiny, np.zeros_like(kept), kept))
    assert list(flushed != 0) == [False, False, True, True, False]
    assert not np.signbit(flushed[[0, 1, 4]]).any()
    assert (kept[:4] != 0).all()


# -- clipping ---------------------------------------------------------------------------------


def test_clipnorm_is_global() -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0])]
    assert oracle.global_norm(grads) == 13.0
    a, b = oracle.clip(grads, clipnorm=0.5)
    np.testing.assert_allclose(a, [0.11538462, 0.15384615], atol=5e-9, rtol=0)
    np.testing.assert_allclose(b, [0.46153846], atol=5e-9, rtol=0)


def test_clipvalue_follows_clipnorm_and_keeps_nan() -> None:
    grads = [np.array([3.0, -4.0]), np.array([12.0])]
    a, b = oracle.clip(grads, clipnorm=6.5, clipvalue=1.75)
    assert [*a, *b] == [1.5, -1.75, 1.75]
    (c,) = oracle.clip([np.array([np.nan, np.inf, -np.inf, -0.0])], clipvalue=2.0)
    assert_same_bits(c, np.array([np.nan, 2.0, -2.0, -0.0]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_sum_of_squares_is_near_the_exact_sum(rng: np.random.Generator, dtype: str, n: int) -> None:
    g = values(rng, n, dtype)
    exact = math.fsum(float(x) ** 2 for x in g)
    assert oracle.sum_of_squares(g) == pytest.approx(exact, rel=1e-14, abs=0.0)


@pytest.mark.parametrize(
    ("tiles", "positions", "gained"),
    [
        (3, (16, 32), 0),  # lane 0, where the large one is: each is lost in its turn
        (3, (1, 17), 4),  # lane 1 collects both
        (3, (8, 4), 0),  # lane 0 takes in lane 8, then lane 4
        (3, (4, 12), 4),  # lane 4 takes in lane 12 first
        (3, (2, 6), 4),
        (3, (1, 2), 0),
        (3, (1, 3), 4),
        (3, (1024, 2048), 0),  # tiles are added in turn
        (3, (1025, 1026), 4),  # within a tile first
        (4096, (2048, 3072), 0),  # one tile is a block
        (4097, (2048, 3072), 4),  # two tiles are
        (4097, (1024, 2048), 0),  # of two blocks
    ],
)
def test_sum_of_squares_adds_in_the_promised_order(
    tiles: int, positions: tuple[int, int], gained: int
) -> None:
    # Next to 2**54 floats are 4 apart: 1.25**2 is lost beside it, twice 1.25**2 gains one place.
    g = np.zeros(tiles * 1024)
    g[0] = 2.0**27
    g[list(positions)] = 1.25
    assert oracle.sum_of_squares(g) - 2.0**54 == gained
