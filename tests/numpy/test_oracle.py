# SPDX-License-Identifier: MIT
"""The oracle against independently computed numbers, because the kernels are compared with it."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import Array, assert_all_same_bits, assert_same_bits

# -- power and the learning rate --------------------------------------------------------------


def enclosed_power(beta: float, t: int) -> tuple[float, float]:
    """Return two floats that enclose ``beta**t`` and are almost always equal.

    Uses integers of about 400 bits, and rounds each product once down and once up. So the result
    does not rely on an error estimate.
    """
    width = 400
    numerator, denominator = beta.as_integer_ratio()
    # Bounds and a binary exponent, normalised so that a small power keeps its digits.
    base = (numerator << width, numerator << width, -(denominator.bit_length() - 1) - width)

    def times(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
        low, high, exponent = a[0] * b[0], a[1] * b[1], a[2] + b[2]
        excess = low.bit_length() - width
        return low >> excess, -(-high >> excess), exponent + excess

    low, high, exponent = base
    for digit in f"{t:b}"[1:]:
        low, high, exponent = times((low, high, exponent), (low, high, exponent))
        if digit == "1":
            low, high, exponent = times((low, high, exponent), base)
    if exponent + width < -2_000:
        return 0.0, 0.0
    scale = Fraction(2) ** exponent
    return float(low * scale), float(high * scale)


# Around the last exact integers of float32, of 32 bits, and of float64.
LARGE_COUNTS = [2**k + i for k in (24, 31, 32, 53) for i in (-1, 0, 1)]
# Also where the oracle switches methods.
SMALL_COUNTS = [1, 2, 3, 10, 999, 1074, 1075, 1076, 1499, 1500, 1501, 1502, 6000]
BETAS = [0.9, 0.999, 0.99999, 1 - 2.0**-24, 1 - 2.0**-31, 1 - 3 * 2.0**-42, 1 - 2.0**-45]


@pytest.mark.parametrize("beta", [*BETAS, 1 - 2.0**-53, 0.5, 0.1, 1e-300, 5e-324])
def test_power_is_the_nearest_float(beta: float) -> None:
    counts = [*SMALL_COUNTS, *LARGE_COUNTS, *(3 + 7 * count // 10 for count in LARGE_COUNTS)]
    if beta > 0.5:  # where the power is near 1/2
        counts.append(math.ceil(math.log(0.5) / math.log1p(beta - 1)))
    for t in counts:
        low, high = enclosed_power(beta, t)
        assert low == oracle.power(beta, t) == high, t
    assert oracle.power(beta, 0) == 1.0


def test_power_rounds_a_tie_to_even() -> None:
    # Half of the smallest subnormal is a tie. Its even neighbour is zero.
    assert oracle.power(0.5, 1074) == 5e-324
    assert oracle.power(0.5, 1075) == 0.0
    assert oracle.power(1 - 2**-53, 2**53) == pytest.approx(math.exp(-1), rel=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_2": 0.5},
        {"beta_2": 0.5, "amsgrad": True},
        {"weight_decay": 0.01, "decay": 0.5},
        {"l2": 0.01, "bias_corrected_epsilon": True},
        {"beta_2": 0.5, "amsgrad": True, "weight_decay": 0.01, "l2": 0.01},
    ],
    ids=str,
)
def test_four_steps_by_the_papers_in_60_digits(options: dict[str, Any]) -> None:
    gradients = [
        [0.1, -0.2, 0.3, 0],
        [-0.1, 0.2, 0.3, 1e-8],
        [1e3, -1e-3, 0, 1e-8],
        [0.1, 1e-3, 0, 0],
    ]
    start = np.ones(4)
    adam = oracle.OracleAdam([start], **options)
    with decimal.localcontext(decimal.Context(prec=60)):
        D = decimal.Decimal
        b1, b2 = D(0.9), D(options.get("beta_2", 0.999))
        p, m, v, vhat = [D(1)] * 4, [D(0)] * 4, [D(0)] * 4, [D(0)] * 4
        for t, gradient in enumerate(gradients, 1):
            lr = D(0.001) / (1 + D(options.get("decay", 0)) * (t - 1))
            root = (1 - b2**t).sqrt()
            epsilon = D(1e-8) * (root if "bias_corrected_epsilon" in options else 1)
            for i in range(4):
                g = D(gradient[i]) + D(options.get("l2", 0)) * p[i]
                p[i] -= lr * D(options.get("weight_decay", 0)) * p[i]
                m[i] = b1 * m[i] + (1 - b1) * g
                v[i] = b2 * v[i] + (1 - b2) * g * g
                vhat[i] = max(vhat[i], v[i]) if "amsgrad" in options else v[i]
                p[i] -= lr * root / (1 - b1**t) * m[i] / (vhat[i].sqrt() + epsilon)
            adam.step([np.array(gradient)])
            moments = [m, v, vhat] if "amsgrad" in options else [m, v]
            np.testing.assert_allclose(adam.params[0], [*map(float, p)], rtol=0, atol=6e-16)
            expected = [[*map(float, moment)] for moment in moments]
            np.testing.assert_allclose(adam.weights()[1:], expected, rtol=2e-15)
            assert adam.weights()[0] == t
    assert_same_bits(start, np.ones(4))  # out of place


# -- clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "expected"),
    [
        ({"clipnorm": 0.5}, [3 / 26, -4 / 26, 12 / 26]),
        ({"clipnorm": 6.5, "clipvalue": 1.75}, [1.5, -1.75, 1.75]),
        ({"clipnorm_per_tensor": 2.5}, [1.5, -2.0, 2.5]),
        # The norm is 13 / 2: a bound of twice that does not clip, a bound of half clips to half.
        ({"clipnorm": 13.0, "divisor": 2}, [1.5, -2, 6]),
        ({"clipnorm": 3.25, "divisor": 2}, [0.75, -1, 3]),
        ({"clipnorm_per_tensor": 5.0, "sign": -1.0}, [-3.0, 4.0, -5.0]),
    ],
    ids=str,
)
def test_clips(clips: dict[str, Any], expected: list[float]) -> None:
    grads = [np.array([3.0, -4.0]), np.array([12.0])]
    assert oracle.global_norm(grads) == 13.0
    np.testing.assert_allclose(np.concatenate(oracle.clip(grads, **clips)), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("tiles", "positions", "gained"),
    [
        (3, (16, 32), 0),  # added to lane 0, where the large number is: each is lost in turn
        (3, (1, 17), 4),  # added up in lane 1 first
        (3, (8, 4), 0),  # lane 0 adds lane 8, then lane 4
        (3, (4, 12), 4),  # lane 4 adds lane 12 first
        (3, (2, 6), 4),
        (3, (1, 2), 0),
        (3, (1, 3), 4),
        (3, (1024, 2048), 0),  # tiles are added one after the other
        (3, (1025, 1026), 4),  # added within a tile first
        (4096, (2048, 3072), 0),  # a block is one tile
        (4097, (2048, 3072), 4),  # a block is two tiles
        (4097, (1024, 2048), 0),  # in two different blocks
    ],
)
def test_sum_of_squares_adds_in_the_promised_order(
    tiles: int, positions: tuple[int, int], gained: int
) -> None:
    # Near 2**54, floats are 4 apart: adding 1.25**2 changes nothing, adding twice 1.25**2 adds 4.
    g = np.zeros(tiles * 1024)
    g[0] = 2.0**27
    g[list(positions)] = 1.25
    assert oracle.sum_of_squares(g) - 2.0**54 == gained


def test_gradient_is_scaled_in_one_rounding() -> None:
    g = np.array([1.0], "float32")
    (scaled,) = oracle.clip([g], clipnorm=0.1, divisor=3.0)
    unscale, shorten = 1 / 3.0, 0.1 / (1 / 3.0)
    assert scaled[0] == np.float32(unscale * shorten)
    assert scaled[0] != np.float32(shorten) * (np.float32(unscale) * g[0])
    (negated,) = oracle.clip([g], sign=-1.0)
    assert negated[0] == -1.0
    assert oracle.clip([g])[0] is g


# -- the optimizer ----------------------------------------------------------------------------


def one(*values: float) -> list[Array]:
    return [np.array(values)]


def test_average_of_known_parameters() -> None:
    # Zero gradients: weight decay alone moves p to 3/4, 9/16 and 27/64.
    options: dict[str, Any] = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    adam = oracle.OracleAdam([np.ones(1)], lr=0.5, weight_decay=0.5, **options)
    assert adam.ema[0][0] == 1.0
    average = (0.65625 + 0.4921875) / 2
    # The first average is p, the second step overwrites p.
    for p, ema in ((0.75, 0.75), (0.65625, 0.65625), (0.4921875, average)):
        adam.step(one(0.0))
        assert (adam.params[0][0], adam.ema[0][0]) == (p, ema)
    adam.swap_ema()
    assert (adam.ema[0][0], adam.params[0][0]) == (0.4921875, average)


# Gradients and options, and one gradient of a plain training with the same results.
ALIKE: list[tuple[list[float], dict[str, Any], float, int]] = [
    ([1024.0], {"loss_scale": 1024.0}, 1.0, 0),
    ([1.0, 2.0, 3.0, 6.0, 5.0], {"gradient_accumulation_steps": 4}, 3.0, 0),
    (
        [np.inf, 1.0, 1e308, 1.5e308, 1.0, 2.0],
        {"gradient_accumulation_steps": 2, "skip_nonfinite": True},
        1.5,
        2,
    ),
    ([2.0], {"maximize": True}, -2.0, 0),
]


@pytest.mark.parametrize(("grads", "options", "other", "skipped"), ALIKE)
def test_options_equal_another_gradient(
    grads: list[float], options: dict[str, Any], other: float, skipped: int
) -> None:
    adam, expected = oracle.OracleAdam(one(0.0), **options), oracle.OracleAdam(one(0.0))
    for x in grads:
        adam.step(one(x))
    expected.step(one(other))
    assert_all_same_bits([*adam.params, *adam.weights()], [*expected.params, *expected.weights()])
    assert adam.skipped_steps == skipped


def test_dynamic_loss_scale_grows_and_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oracle.GROWTH_INTERVAL == 2000
    monkeypatch.setattr(oracle, "GROWTH_INTERVAL", 20)
    adam, seen = oracle.OracleAdam([np.zeros(1)], loss_scale="dynamic"), []
    for i in range(43):
        adam.step(one(np.nan if i == 20 else 1.0))
        seen.append(adam.current_loss_scale)
    assert seen == [2.0**15] * 19 + [2.0**16] + [2.0**15] * 20 + [2.0**16] * 3
    assert (adam.iterations, adam.skipped_steps, adam.good_steps) == (42, 1, 2)
    for scale, gradient in ((2.0**127, 1.0), (1.0, np.inf)):  # the largest and the smallest
        adam.dynamic_loss_scale, adam.good_steps = scale, 19
        adam.step(one(gradient))
        assert adam.current_loss_scale == scale


def test_rows_are_added_in_the_order_in_which_they_come() -> None:
    indices = np.array([7, 2, 7, 7, 2])
    grads = np.array([1e8, 1.0, 1.0, -1e8, 2.0], "float32")
    rows, summed = oracle.sum_rows(indices, grads)
    assert rows.tolist() == [2, 7]
    assert_same_bits(summed, np.array([3.0, 0.0], "float32"))  # 1e8 + 1 is 1e8
    rows, summed = oracle.sum_rows(indices[[0, 1, 3, 2, 4]], grads[[0, 1, 3, 2, 4]])
    assert_same_bits(summed, np.array([3.0, 1.0], "float32"))
    _, summed = oracle.sum_rows(np.array([0]), np.array([[-0.0, 0.0]]))
    assert_same_bits(summed, np.array([[-0.0, 0.0]]))
