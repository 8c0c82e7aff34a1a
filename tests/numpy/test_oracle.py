# SPDX-License-Identifier: MIT
"""The oracle against independently computed numbers, because the kernels are compared with it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, values

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
    # Half of the smallest subnormal is a tie. Its even neighbour is zero.
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
    # beta**(2**k) by repeated squaring with integers of 400 bits, an independent computation.
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
        # Half a unit in the last printed digit, plus the rounding of a few operations.
        np.testing.assert_allclose(adam.params[0], p, rtol=0, atol=3e-16)


# Each computed to 60 decimal digits from the formulas of the papers. With epsilon 0, weight decay
# and l2 also agree with torch's AdamW and Adam.
GRADIENTS = [[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0.3, 1e-8], [1e3, -1e-3, 0, 1e-8], [0.1, 1e-3, 0, 0]]
GOLDEN: list[tuple[dict[str, Any], list[list[float]]]] = [
    (
        {"beta_2": 0.5, "amsgrad": False},
        [
            [0.9990000001414213, 1.0009999999292893, 0.9990000000471404, 1.0],
            [0.9990526317142914, 1.0009473683533807, 0.9980000000856305, 0.9997329968756962],
            [0.9985644901110914, 1.0008994578477906, 0.9970361373535486, 0.9993815410190973],
            [0.9980576507841427, 1.000846468488142, 0.9960354661257323, 0.999082944866396],
        ],
    ),
    (
        {"beta_2": 0.5, "amsgrad": True},
        [
            [0.9990000001414213, 1.0009999999292893, 0.9990000000471404, 1.0],
            [0.9990526317142914, 1.0009473683533807, 0.9980000000856305, 0.9997329968756962],
            [0.9985644901110914, 1.0009134899445515, 0.9973184462007764, 0.9993815410190973],
            [0.9982061005824479, 1.0008869939384968, 0.9968181105676103, 0.9991235337030961],
        ],
    ),
    (
        {"weight_decay": 0.01},
        [
            [0.9989900031622677, 1.0009899984188637, 0.9989900010540914, 0.99999],
            [0.9990326447234664, 1.0009273569987907, 0.9979800118996227, 0.9999571897539448],
            [0.9983838465535236, 1.0008789238880447, 0.9971970297777863, 0.9999104507931443],
            [0.9978505320606188, 1.0008353836846577, 0.9965538613415006, 0.9998703714240397],
        ],
    ),
    (
        {"l2": 0.01},
        [
            [0.9990000028747896, 1.0009999983356461, 0.9990000010200886, 0.9990000316217766],
            [0.9989529217761275, 1.000897473881551, 0.9980000025825624, 0.9980000801747994],
            [0.998314103014784, 1.0007979366061512, 0.9972126519170849, 0.9970001682679082],
            [0.9977907576139067, 1.0006938760206368, 0.996554640866124, 0.9960003149677952],
        ],
    ),
    (
        {"beta_2": 0.5, "amsgrad": True, "weight_decay": 0.01, "l2": 0.01},
        [
            [0.9989900001285649, 1.0009899999255678, 0.9989900000456198, 0.9989900014142116],
            [0.9989312976948971, 1.0008791270568038, 0.9979800056101654, 0.997979871073966],
            [0.9984331584357968, 1.0007827354231014, 0.9972756374189834, 0.9969695301794611],
            [0.998064774475921, 1.000691732422319, 0.9967454481939094, 0.9959589185453047],
        ],
    ),
]


@pytest.mark.parametrize(("options", "expected"), GOLDEN, ids=[str(g[0]) for g in GOLDEN])
def test_four_steps_by_the_papers(options: dict[str, Any], expected: list[list[float]]) -> None:
    adam = oracle.OracleAdam([np.ones(4)], **options)
    for g, p in zip(GRADIENTS, expected, strict=True):
        adam.step([np.array(g)])
        np.testing.assert_allclose(adam.params[0], p, rtol=0, atol=6e-16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_step_keeps_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, dtype)
    every = oracle.adam_step(x, x, x, x, step=1, vhat=x, ema=x, weight_decay=0.1, l2=0.1)
    assert len(every) == 5
    for result in every:
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
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("old_vhat", [0.01, 0.06])
def test_step_with_options_is_rounded_once_per_operation(
    dtype: str, step: int, old_vhat: float
) -> None:
    T = np.dtype(dtype).type
    p, g, m, v, vhat, ema = (T(x) for x in (0.7, 0.3, -0.2, 0.05, old_vhat, 0.6))
    lr1 = 0.001 * (1 / (1 + 0.3 * (step - 1)))
    g1 = T(g + T(T(0.07) * p))
    p1 = T(p - T(T(lr1 * 0.9) * p))
    m1 = T(T(T(0.9) * m) + T(T(1 - 0.9) * g1))
    v1 = T(T(T(0.999) * v) + T(T(1 - 0.999) * T(g1 * g1)))
    vhat1 = max(v1, vhat)
    rate = T(oracle.lr_t(lr1, 0.9, 0.999, step))
    p1 = T(p1 - T(T(rate * m1) / T(np.sqrt(vhat1) + T(1e-8))))
    mu = 0.0 if step == 1 else 0.9
    ema1 = T(T(T(mu) * ema) + T(T(1 - mu) * p1))
    actual = oracle.adam_step(
        *(np.array([x]) for x in (p, g, m, v)),
        step=step,
        decay=0.3,
        vhat=np.array([vhat]),
        ema=np.array([ema]),
        ema_momentum=0.9,
        weight_decay=0.9,
        l2=0.07,
    )
    for a, e in zip(actual, (p1, m1, v1, vhat1, ema1), strict=True):
        assert_same_bits(a, np.array([e]))


@pytest.mark.parametrize(
    ("vhat", "expected"),
    [([0.25, 1.0, 4.0], [0.5, 1.0, 4.0]), ([np.nan, np.inf, 0.5], [np.nan, np.inf, 0.5])],
)
def test_vhat_is_the_larger_one_and_keeps_nan(vhat: list[float], expected: list[float]) -> None:
    zero = np.zeros(3)
    *_, new = oracle.adam_step(
        zero, zero, zero, np.ones(3), step=1, beta_2=0.5, vhat=np.array(vhat)
    )
    assert_same_bits(new, np.array(expected))
    *_, new = oracle.adam_step(
        zero, zero, zero, np.full(3, np.nan), step=1, vhat=np.array([0.0, 1.0, np.inf])
    )
    assert_same_bits(new, np.full(3, np.nan))


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


def test_clipnorm_per_tensor_scales_each_by_its_own_norm() -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0]), np.array([-2.5])]
    a, b, c = oracle.clip(grads, clipnorm_per_tensor=2.5)
    assert [*a, *b, *c] == [1.5, 2.0, 2.5, -2.5]


def test_norms_are_those_of_the_divided_gradients() -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0])]
    # The norm is 13 / 2: a bound of twice that does not clip, a bound of half that clips to half.
    for divisor, clipnorm, expected in [(2, 13.0, [1.5, 2, 6]), (2, 3.25, [0.75, 1, 3])]:
        a, b = oracle.clip(grads, clipnorm=clipnorm, divisor=divisor)
        assert [*a, *b] == expected


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


def test_weight_decay_of_silent_gradients_is_geometric() -> None:
    adam = oracle.OracleAdam([np.ones(1), np.ones(1)], lr=0.5, weight_decay=0.5, excluded=[1])
    for expected in (0.75, 0.5625, 0.421875):
        adam.step([np.zeros(1), np.zeros(1)])
        assert [p[0] for p in adam.params] == [expected, 1.0]
    decayed = oracle.OracleAdam([np.ones(1)], lr=0.5, weight_decay=0.5, decay=1.0)
    for expected in (0.75, 0.75 * 0.875):  # lr, then lr / 2
        decayed.step([np.zeros(1)])
        assert decayed.params[0][0] == expected


def test_l2_is_a_part_of_the_gradient() -> None:
    p, g = np.array([2.0, -4.0]), np.array([1.0, 0.25])
    adam = oracle.OracleAdam([p, p], l2=0.25, excluded=[1])
    adam.step([g, g])
    plain = oracle.OracleAdam([p, p])
    plain.step([g + 0.25 * p, g])
    assert_all_same_bits(adam.params, plain.params)
    assert_all_same_bits(adam.weights(), plain.weights())


def test_amsgrad_keeps_what_v_forgets() -> None:
    adam = oracle.OracleAdam([np.zeros(1)], beta_2=0.5, amsgrad=True)
    adam.step(one(2.0))
    for v in (1.0, 0.5, 0.25):
        adam.step(one(0.0))
        assert (adam.v[0][0], adam.vhat[0][0]) == (v, 2.0)
    assert len(adam.weights()) == 4


def test_average_of_known_parameters() -> None:
    # Zero gradients: weight decay alone moves p to 3/4, 9/16 and 27/64.
    adam = oracle.OracleAdam(
        [np.ones(1)],
        lr=0.5,
        weight_decay=0.5,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=2,
    )
    assert adam.ema[0][0] == 1.0
    adam.step(one(0.0))
    assert (adam.params[0][0], adam.ema[0][0]) == (0.75, 0.75)  # the first average is p
    adam.step(one(0.0))
    assert (adam.params[0][0], adam.ema[0][0]) == (0.65625, 0.65625)  # overwritten
    adam.step(one(0.0))
    assert (adam.params[0][0], adam.ema[0][0]) == (0.4921875, (0.65625 + 0.4921875) / 2)
    adam.swap_ema()
    assert (adam.ema[0][0], adam.params[0][0]) == (0.4921875, (0.65625 + 0.4921875) / 2)


def steps_of(grads: list[Array], **options: Any) -> oracle.OracleAdam:
    adam = oracle.OracleAdam([np.zeros_like(grads[0])], **options)
    for g in grads:
        adam.step([g])
    return adam


def test_loss_scale_that_is_a_power_of_two_changes_nothing(rng: np.random.Generator) -> None:
    grads = [values(rng, 50, "float32") for _ in range(3)]
    limits = {"clipnorm": 3.0, "clipvalue": 0.5}
    plain = steps_of(grads, **limits)
    scaled = steps_of([np.float32(1024) * g for g in grads], loss_scale=1024.0, **limits)
    assert_all_same_bits(scaled.params, plain.params)
    assert_all_same_bits(scaled.weights(), plain.weights())


def test_accumulation_steps_with_the_mean() -> None:
    adam = steps_of(
        [np.array([x]) for x in (1.0, 2.0, 3.0, 6.0, 5.0)], gradient_accumulation_steps=4
    )
    plain = steps_of([np.array([3.0])])
    assert (adam.iterations, adam.accumulated) == (1, 1)
    assert_all_same_bits(adam.params, plain.params)
    assert_all_same_bits(adam.weights(), plain.weights())


def test_skipped_steps_leave_everything_and_begin_the_mean_anew() -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "skip_nonfinite": True}
    bad = [np.array([x]) for x in (np.inf, 1.0, 1e308, 1.5e308)]
    adam = steps_of(bad, **options)
    assert (adam.iterations, adam.skipped_steps, adam.accumulated) == (0, 2, 0)
    assert_all_same_bits(adam.params, one(0.0))
    adam.step(one(1.0))
    adam.step(one(2.0))
    assert_all_same_bits(adam.params, steps_of([np.array([1.5])]).params)


def test_dynamic_loss_scale_grows_and_halves() -> None:
    adam = oracle.OracleAdam([np.zeros(1)], loss_scale="dynamic")
    seen = []
    for i in range(4003):
        adam.step(one(np.nan if i == 2000 else 1.0))
        seen.append(adam.current_loss_scale)
    assert seen == [2.0**15] * 1999 + [2.0**16] + [2.0**15] * 2000 + [2.0**16] * 3
    assert (adam.iterations, adam.skipped_steps, adam.good_steps) == (4002, 1, 2)
    adam.dynamic_loss_scale, adam.good_steps = 2.0**127, 1999
    adam.step(one(1.0))
    assert adam.current_loss_scale == 2.0**127
    adam.dynamic_loss_scale = 1.0
    adam.step(one(np.inf))
    assert adam.current_loss_scale == 1.0


def test_maximize_ascends(rng: np.random.Generator) -> None:
    grads = [values(rng, 50, "float64") for _ in range(3)]
    up, down = steps_of(grads, maximize=True), steps_of(grads)
    np.testing.assert_array_equal(up.params[0], -down.params[0])


def test_schedule_is_asked_for_the_steps_before() -> None:
    asked = []

    def schedule(iterations: int) -> float:
        asked.append(iterations)
        return 0.5 / (1 + iterations)

    scheduled = steps_of([np.ones(2)] * 3, lr=schedule)
    assert asked == [0, 1, 2]
    assert_all_same_bits(scheduled.params, steps_of([np.ones(2)] * 3, lr=0.5, decay=1.0).params)


def test_zero_grad_is_what_a_call_leaves_behind() -> None:
    adam = oracle.OracleAdam([np.zeros(1)], zero_grad=True, gradient_accumulation_steps=2)
    for _ in range(2):
        assert_all_same_bits(adam.step(one(-3.0)), one(0.0))
    assert_all_same_bits(steps_of([np.zeros(1)]).step(one(-3.0)), one(-3.0))


# -- sparse rows ------------------------------------------------------------------------------


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


def test_lazy_rows_are_a_small_table_of_their_own(rng: np.random.Generator) -> None:
    table, rows = values(rng, (6, 3), "float64"), values(rng, (2, 3), "float64")
    options: dict[str, Any] = {"amsgrad": True, "use_ema": True, "clipnorm": 0.5, "l2": 0.1}
    whole = oracle.OracleAdam([table], **options)
    part = oracle.OracleAdam([table[[1, 4]]], **options)
    for _ in range(3):
        whole.apply_sparse(np.array([4, 1]), rows[::-1])
        part.step([rows])
    others = [0, 2, 3, 5]
    for name in ("params", "m", "v", "vhat", "ema"):
        (ours,), (theirs,) = getattr(whole, name), getattr(part, name)
        assert_same_bits(ours[[1, 4]], theirs, name)
        untouched = table if name in ("params", "ema") else np.zeros_like(table)
        assert_same_bits(ours[others], untouched[others], name)


def test_dense_rows_are_a_gradient_with_zeros(rng: np.random.Generator) -> None:
    table, rows = values(rng, (6, 3), "float64"), values(rng, (2, 3), "float64")
    sparse, dense = (oracle.OracleAdam([table], weight_decay=0.1) for _ in range(2))
    g = np.zeros_like(table)
    g[[1, 4]] = rows
    for _ in range(3):
        sparse.apply_sparse(np.array([1, 4]), rows, lazy=False)
        dense.step([g])
    assert_all_same_bits(sparse.params, dense.params)
    assert_all_same_bits(sparse.weights(), dense.weights())
