# SPDX-License-Identifier: MIT
"""The rows of the table of extreme numbers in docs/numerics.md, which names these tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam, adam_step, global_norm
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits

PAGE = Path(__file__).parents[2] / "docs/numerics.md"
SOURCE = Path(__file__).read_text(encoding="utf-8")

INF, NAN = np.inf, np.nan


def limits(dtype: str) -> tuple[float, float]:
    """The largest number and the smallest normal number."""
    info = np.finfo(dtype)
    return float(info.max), float(info.smallest_normal)


def trained(
    dtype: str, first: Any, *, steps: int = 1, start: float = 1.0, **options: Any
) -> tuple[Array, Adam]:
    """Two parameters and their optimizer after steps, the first with these gradients.

    The gradients of later steps are 1/2.
    """
    p = np.full(len(first), start, dtype)
    adam = Adam(**options)
    g = np.array(first, dtype)
    for _ in range(steps):
        adam.apply_gradients([(g, p)])
        g = np.full(len(first), 0.5, dtype)
    return p, adam


def moments(adam: Adam) -> tuple[Array, Array]:
    _, m, v, *_ = adam.weights
    return m, v


def test_every_row_of_the_page_names_its_test_and_every_test_is_named() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Extreme numbers\n")[2]
    named = re.findall(r"`(test_\w+)`", section.partition("\n## ")[0])
    own = re.findall(r"^def (test_\w+)", SOURCE, re.MULTILINE)
    assert named == own[1:]


# -- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_gradient_stays_in_its_element(dtype: str) -> None:
    options: dict[str, Any] = {"amsgrad": True, "use_ema": True, "weight_decay": 0.1}
    p, adam = trained(dtype, [NAN, 0.5], steps=50, **options)
    q, other = trained(dtype, [0.5], steps=50, **options)
    for arrays, clean in zip(
        ([p], adam.weights[1:], adam.ema), ([q], other.weights[1:], other.ema), strict=True
    ):
        for array, expected in zip(arrays, clean, strict=True):
            assert np.isnan(array[0])
            assert_same_bits(array[1:], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_gradient_makes_the_parameter_nan(dtype: str) -> None:
    p, adam = trained(dtype, [INF, -INF], steps=50)
    m, v = moments(adam)
    assert m.tolist() == [INF, -INF]
    assert v.tolist() == [INF, INF]
    assert np.isnan(p).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_square_that_overflows_freezes_the_element(dtype: str) -> None:
    largest, _ = limits(dtype)
    root = np.sqrt(np.finfo(dtype).max)
    beyond = np.nextafter(root, np.dtype(dtype).type(INF))
    p, adam = trained(dtype, [largest, -largest, beyond, root], steps=50)
    m, v = moments(adam)
    assert v[:3].tolist() == [INF, INF, INF]
    assert np.isfinite(v[3])
    assert np.isfinite(m).all()
    assert p[:3].tolist() == [1.0, 1.0, 1.0]
    assert p[3] < 1.0
    assert float(root) == pytest.approx({"float32": 1.84e19, "float64": 1.34e154}[dtype], rel=0.01)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_too_small_to_be_squared(dtype: str) -> None:
    # v is 0, so the update is lr_t * m / epsilon. m counts until it is subnormal.
    _, tiny = limits(dtype)
    g = 2.0 ** {"float32": -80, "float64": -600}[dtype]
    p, adam = trained(dtype, [g, 8 * tiny], start=0.0)
    m, v = moments(adam)
    assert v.tolist() == [0.0, 0.0]
    assert (m[0] > 0, m[1] > 0) == (True, False)
    lr_t = 0.001 * np.sqrt(1 - 0.999) / (1 - 0.9)
    np.testing.assert_allclose(p[0], -lr_t * 0.1 * g / 1e-8, 1e-6, 0)
    assert p[1] == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_gradient_moves_nothing(dtype: str) -> None:
    _, tiny = limits(dtype)
    p, adam = trained(dtype, [tiny / 2, -tiny / 2], start=0.0)
    assert_all_same_bits([p, *moments(adam)], [np.zeros(2, dtype)] * 3)
    p, adam = trained(dtype, [tiny / 2, -tiny / 2], start=0.0, flush_denormals=False)
    m, _ = moments(adam)
    assert m[0] == -m[1] > 0
    assert p[0] == -p[1] < 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_clipvalue_bounds_an_infinite_gradient_and_keeps_nan(dtype: str) -> None:
    p, _ = trained(dtype, [INF, -INF, NAN], clipvalue=2.0)
    q, _ = trained(dtype, [2.0, -2.0, NAN])
    assert_same_bits(p, q)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", ["clipnorm", "clipnorm_per_tensor"])
def test_clipnorm_of_gradients_that_are_not_finite(dtype: str, option: str) -> None:
    clip: dict[str, Any] = {option: 1.0}
    p, adam = trained(dtype, [INF, 3.0], **clip)
    m, _ = moments(adam)
    assert np.isnan([p[0], m[0]]).all()
    assert (p[1], m[1]) == (1.0, 0.0)
    p, _ = trained(dtype, [NAN, 3.0], **clip)
    q, _ = trained(dtype, [NAN, 3.0])
    assert_same_bits(p, q)


def test_norm_of_float64_beyond_its_squares() -> None:
    g = np.array([2e154, 1.0])
    assert global_norm([g]) == INF
    assert Adam(clipnorm=1.0).get_gradients([g], [g])[0].tolist() == [0.0, 0.0]
    g = np.array([1e-170])
    assert global_norm([g]) == 0.0
    assert Adam(clipnorm=1e-300).get_gradients([g], [g])[0].tolist() == [1e-170]


def test_factor_below_the_smallest_float32() -> None:
    for dtype, expected in (("float32", 0.0), ("float64", pytest.approx(1e-30))):
        g = np.array([1e20], dtype)
        (clipped,) = Adam(clipnorm=1e-30).get_gradients([g], [g])
        assert clipped[0] == expected
    g = np.array([-5.0, 5.0], np.float32)
    (clipped,) = Adam(clipvalue=1e-50).get_gradients([g], [g])
    assert_same_bits(clipped, np.array([-0.0, 0.0], np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_skip_nonfinite_leaves_everything(dtype: str, bad: float) -> None:
    both: list[dict[str, Any]] = [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}]
    for options in both:
        p, adam = trained(dtype, [0.5, bad], **options)
        assert_all_same_bits([p, *moments(adam)], [np.ones(2, dtype), *[np.zeros(2, dtype)] * 2])
        assert (adam.iterations, adam.skipped_steps) == (0, 1)
        # Finite, although its square overflows in this dtype.
        p, adam = trained(dtype, [0.5, limits(dtype)[0]], **options)
        assert (adam.iterations, adam.skipped_steps) == (1, 0)


# -- parameters and state ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_parameter_that_is_not_finite_stays_so(dtype: str) -> None:
    p = np.array([INF, -INF, NAN], dtype)
    adam = Adam()
    adam.apply_gradients([(np.full(3, 0.5, dtype), p)])
    assert_same_bits(p, np.array([INF, -INF, NAN], dtype))
    assert all(np.isfinite(moment).all() for moment in moments(adam))
    for decaying, kept in ((Adam(weight_decay=0.1), True), (Adam(l2=0.1), False)):
        p, adam = np.array([INF, -INF, NAN], dtype), decaying
        adam.apply_gradients([(np.full(3, 0.5, dtype), p)])
        assert np.isnan(p).all()
        assert np.isfinite(moments(adam)[0]).all() == kept


@pytest.mark.parametrize("dtype", FLOATS)
def test_state_that_is_not_finite_stays_so(dtype: str) -> None:
    # No factor removes an infinity, neither beta_1 = 0 nor the momentum of the first average.
    p, m, v = np.ones(2, dtype), np.array([INF, NAN], dtype), np.ones(2, dtype)
    g = np.ones(2, dtype)
    adam_step(p, g, m, v, step=2, beta_1=0.0)
    assert np.isnan([p, m]).all()
    p, m, v, ema = np.ones(2, dtype), *np.zeros((2, 2), dtype), np.array([INF, NAN], dtype)
    adam_step(p, g, m, v, step=1, ema=ema)
    assert np.isnan(ema).all()
    p, m, v = np.ones(2, dtype), np.zeros(2, dtype), np.array([INF, -1.0], dtype)
    adam_step(p, g, m, v, step=2)
    assert p[0] == 1.0
    assert np.isnan(p[1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_vhat_keeps_infinity_and_nan(dtype: str) -> None:
    p, m, v = np.ones(2, dtype), np.zeros(2, dtype), np.zeros(2, dtype)
    vhat = np.array([INF, NAN], dtype)
    adam_step(p, np.ones(2, dtype), m, v, step=2, vhat=vhat)
    assert_same_bits(vhat, np.array([INF, NAN], dtype))
    assert p[0] == 1.0
    assert np.isnan(p[1])


# -- hyper-parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_lr_of_zero(dtype: str) -> None:
    p, adam = trained(dtype, [0.5, -0.5], lr=0.0, weight_decay=0.1)
    assert p.tolist() == [1.0, 1.0]
    assert all(moment.all() for moment in moments(adam))
    p = np.array([-0.0, -0.0], dtype)
    Adam(lr=0.0).apply_gradients([(np.array([1.0, -1.0], dtype), p)])
    assert_same_bits(p, np.array([-0.0, 0.0], dtype))


def test_constant_beyond_float32() -> None:
    p, _ = trained("float32", [0.5, -0.5, 0.0], lr=1e40)
    assert_same_bits(p, np.array([-INF, INF, NAN], np.float32))
    p, _ = trained("float32", [0.5, -0.5, 0.0], epsilon=1e40)
    assert p.tolist() == [1.0, 1.0, 1.0]
    p, _ = trained("float32", [0.5, -0.5, 0.0], weight_decay=1e45)
    assert_same_bits(p, np.array([-INF, -INF, -INF], np.float32))
    p, _ = trained("float32", [0.5], weight_decay=1e45, start=0.0)
    assert np.isnan(p).all()
    p, _ = trained("float32", [0.5, -0.5], clipvalue=1e40)
    q, _ = trained("float32", [0.5, -0.5])
    assert_same_bits(p, q)


def test_constant_below_float32() -> None:
    p, adam = trained("float32", [0.5, -0.5], lr=1e-50)
    assert p.tolist() == [1.0, 1.0]
    assert moments(adam)[0].all()
    p, _ = trained("float32", [0.5, 0.0], epsilon=1e-50)
    assert p[0] < 1
    assert np.isnan(p[1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_epsilon_of_zero(dtype: str) -> None:
    # 0 / 0 where the gradient was 0, and m / 0 where its square underflows.
    _, tiny = limits(dtype)
    p, _ = trained(dtype, [0.5, 0.0, np.sqrt(tiny)], epsilon=0.0)
    assert p[0] < 1
    assert_same_bits(p[1:], np.array([NAN, -INF], dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_beta_next_to_one(dtype: str) -> None:
    beta = 1 - 2.0**-53
    p, adam = trained(dtype, [0.5, -0.5], beta_1=beta, beta_2=beta)
    m, v = moments(adam)
    assert m.tolist() == [2.0**-54, -(2.0**-54)]
    assert v.tolist() == [2.0**-55, 2.0**-55]
    # (sqrt(2^-53) / 2^-53) * 2^-54 / (2^-27.5 + epsilon)
    np.testing.assert_allclose(1 - p[0], 0.001 * 2**-27.5 / (2**-27.5 + 1e-8), 1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decay_that_overflows(dtype: str) -> None:
    p, adam = trained(dtype, [0.5, -0.5], steps=1, decay=1e308)
    after_first = p.copy()
    assert after_first[0] < 1  # the first step does not decay
    for _ in range(3):
        adam.apply_gradients([(np.full(2, 0.5, dtype), p)])
    assert_same_bits(p, after_first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", INF),
        ("lr", NAN),
        ("epsilon", INF),
        ("beta_1", 1.0),
        ("decay", INF),
        ("weight_decay", NAN),
        ("clipnorm", INF),
        ("loss_scale", 2.0**128),
        ("loss_scale", 0.0),
    ],
)
def test_hyper_parameter_that_is_not_finite_is_refused(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^{name} must .* Received: {name}="):
        Adam(**options)
