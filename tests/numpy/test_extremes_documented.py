# SPDX-License-Identifier: MIT
"""The rows of the table of extreme numbers in docs/numerics.md, which names these tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam, adam_step, global_norm
from helpers import FLOATS, Array, assert_same_bits

PAGE = Path(__file__).parents[2] / "docs/numerics.md"
SOURCE = Path(__file__).read_text(encoding="utf-8")

INF, NAN = np.inf, np.nan
SKIPPING: list[dict[str, Any]] = [{"skip_nonfinite": True}, {"loss_scale": "dynamic"}]


@pytest.fixture(params=FLOATS)
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def tiny(dtype: str) -> float:
    return float(np.finfo(dtype).smallest_normal)


def trained(
    dtype: str, first: Any, *, steps: int = 1, start: Any = 1.0, **options: Any
) -> tuple[Array, Array, Array, Adam]:
    """Return p, m, v and the optimizer after these gradients, and then after some of 1/2."""
    p = np.full(len(first), start, dtype)
    adam = Adam(**options)
    for i in range(steps):
        adam.apply_gradients([(np.array(first if i == 0 else [0.5] * len(first), dtype), p)])
    return p, adam.weights[1], adam.weights[2], adam


def clipped(dtype: str, g: Any, **clip: Any) -> Array:
    grads = [np.array(g, dtype)]
    return Adam(**clip).get_gradients(grads, grads)[0]


def is_same(actual: Array, expected: Any) -> None:
    """Compare numbers, with the signs of zeros, where every NaN is the same."""
    assert_same_bits(actual, np.array(expected, actual.dtype))


def test_every_row_of_the_page_names_its_test_and_every_test_is_named() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Extreme numbers\n")[2]
    named = re.findall(r"`(test_\w+)`", section.partition("\n## ")[0])
    own = re.findall(r"^def (test_\w+)", SOURCE, re.MULTILINE)
    assert named == own[1:]


def test_nan_gradient_stays_in_its_element(dtype: str) -> None:
    options: dict[str, Any] = {"amsgrad": True, "use_ema": True, "weight_decay": 0.1}
    p, _, _, adam = trained(dtype, [NAN, 0.5], steps=50, **options)
    q, _, _, other = trained(dtype, [0.5], steps=50, **options)
    clean = [q, *other.weights[1:], *other.ema]
    for array, expected in zip([p, *adam.weights[1:], *adam.ema], clean, strict=True):
        is_same(array, [NAN, *expected])


def test_infinite_gradient_makes_the_parameter_nan(dtype: str) -> None:
    p, m, v, _ = trained(dtype, [INF, -INF], steps=50)
    is_same(np.array([p, m, v]), [[NAN, NAN], [INF, -INF], [INF, INF]])


def test_square_that_overflows_freezes_the_element(dtype: str) -> None:
    largest = np.finfo(dtype).max
    root = np.sqrt(largest)
    beyond = np.nextafter(root, np.dtype(dtype).type(INF))
    p, m, v, _ = trained(dtype, [largest, -largest, beyond, root], steps=50)
    assert np.isinf(v).tolist() == [True, True, True, False]
    assert np.isfinite(m).all()
    is_same(p[:3], [1.0, 1.0, 1.0])
    assert p[3] < 1.0
    assert float(root) == pytest.approx({"float32": 1.84e19, "float64": 1.34e154}[dtype], rel=0.01)


def test_gradient_too_small_to_be_squared(dtype: str) -> None:
    # v is 0, so the update is lr_t * m / epsilon. m counts until it is subnormal.
    g = 2.0 ** {"float32": -80, "float64": -600}[dtype]
    p, m, v, _ = trained(dtype, [g, 8 * tiny(dtype)], start=0.0)
    is_same(v, [0.0, 0.0])
    assert (m[0] > 0, m[1] > 0) == (True, False)
    lr_t = 0.001 * np.sqrt(1 - 0.999) / (1 - 0.9)
    np.testing.assert_allclose(p, [-lr_t * 0.1 * g / 1e-8, 0.0], 1e-6, 0)


def test_subnormal_gradient_moves_nothing(dtype: str) -> None:
    g = [tiny(dtype) / 2, -tiny(dtype) / 2]
    p, m, v, _ = trained(dtype, g, start=0.0)
    is_same(np.array([p, m, v]), [[0.0, 0.0]] * 3)
    p, m, _, _ = trained(dtype, g, start=0.0, flush_denormals=False)
    assert m[0] == -m[1] > 0
    assert p[0] == -p[1] < 0


def test_clipvalue_bounds_an_infinite_gradient_and_keeps_nan(dtype: str) -> None:
    is_same(clipped(dtype, [INF, -INF, NAN], clipvalue=2.0), [2.0, -2.0, NAN])
    p, *_ = trained(dtype, [INF, -INF, NAN], clipvalue=2.0)
    is_same(p, trained(dtype, [2.0, -2.0, NAN])[0])


@pytest.mark.parametrize("option", ["clipnorm", "clipnorm_per_tensor"])
def test_clipnorm_of_gradients_that_are_not_finite(dtype: str, option: str) -> None:
    clip: dict[str, Any] = {option: 1.0}
    p, m, *_ = trained(dtype, [INF, 3.0], **clip)
    is_same(np.array([p, m]), [[NAN, 1.0], [NAN, 0.0]])
    is_same(clipped(dtype, [NAN, 3.0], **clip), [NAN, 3.0])


def test_norm_of_float64_beyond_its_squares() -> None:
    for g, norm, clip, left in (([2e154, 1.0], INF, 1.0, [0.0, 0.0]), ([1e-170], 0, 1e-300, None)):
        assert global_norm([np.array(g)]) == norm
        is_same(clipped("float64", g, clipnorm=clip), left or g)


def test_factor_below_the_smallest_float32() -> None:
    is_same(clipped("float32", [1e20], clipnorm=1e-30), [0.0])
    assert clipped("float64", [1e20], clipnorm=1e-30)[0] == pytest.approx(1e-30)
    is_same(clipped("float32", [-5.0, 5.0], clipvalue=1e-50), [-0.0, 0.0])


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("options", SKIPPING, ids=str)
def test_skip_nonfinite_leaves_everything(dtype: str, bad: float, options: Any) -> None:
    p, m, v, adam = trained(dtype, [0.5, bad], **options)
    is_same(np.array([p, m, v]), [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert (adam.iterations, adam.skipped_steps) == (0, 1)
    # Finite, although its square overflows in this dtype.
    *_, adam = trained(dtype, [0.5, np.finfo(dtype).max], **options)
    assert (adam.iterations, adam.skipped_steps) == (1, 0)


def test_parameter_that_is_not_finite_stays_so(dtype: str) -> None:
    start, g = [INF, -INF, NAN], [0.5, 0.5, 0.5]
    p, m, v, _ = trained(dtype, g, start=start)
    is_same(p, start)
    assert np.isfinite([m, v]).all()
    p, m, *_ = trained(dtype, g, start=start, weight_decay=0.1)
    q, spoilt, *_ = trained(dtype, g, start=start, l2=0.1)
    assert np.isnan([p, q]).all()
    assert np.isfinite(m).all()
    assert not np.isfinite(spoilt).any()


def test_state_that_is_not_finite_stays_so(dtype: str) -> None:
    # No factor removes an infinity, neither beta_1 = 0 nor the momentum of the first average.
    bad, one = np.array([INF, NAN], dtype), np.ones(2, dtype)
    p, m = one.copy(), bad.copy()
    adam_step(p, one, m, one.copy(), step=2, beta_1=0.0)
    assert np.isnan([p, m]).all()
    ema = bad.copy()
    adam_step(one.copy(), one, 0 * one, 0 * one, step=1, ema=ema)
    assert np.isnan(ema).all()
    p, v = one.copy(), np.array([INF, -1.0], dtype)
    adam_step(p, one, 0 * one, v, step=2)
    is_same(p, [1.0, NAN])


def test_vhat_keeps_infinity_and_nan(dtype: str) -> None:
    p, one, vhat = np.ones(2, dtype), np.ones(2, dtype), np.array([INF, NAN], dtype)
    adam_step(p, one, 0 * one, 0 * one, step=2, vhat=vhat)
    is_same(np.array([vhat, p]), [[INF, NAN], [1.0, NAN]])


def test_lr_of_zero(dtype: str) -> None:
    p, m, v, _ = trained(dtype, [0.5, -0.5], lr=0.0, weight_decay=0.1)
    is_same(p, [1.0, 1.0])
    assert m.all()
    assert v.all()
    is_same(trained(dtype, [1.0, -1.0], lr=0.0, start=-0.0)[0], [-0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": 1e40}, [-INF, INF, NAN]),
        ({"epsilon": 1e40}, [1.0, 1.0, 1.0]),
        ({"weight_decay": 1e45}, [-INF, -INF, -INF]),
        ({"weight_decay": 1e45, "start": 0.0}, [NAN, NAN, NAN]),
    ],
    ids=str,
)
def test_constant_beyond_float32(options: dict[str, Any], expected: list[float]) -> None:
    is_same(trained("float32", [0.5, -0.5, 0.0], **options)[0], expected)
    is_same(clipped("float32", [0.5, -0.5], clipvalue=1e40), [0.5, -0.5])


def test_constant_below_float32() -> None:
    p, m, *_ = trained("float32", [0.5, -0.5], lr=1e-50)
    is_same(p, [1.0, 1.0])
    assert m.all()
    p, *_ = trained("float32", [0.5, 0.0], epsilon=1e-50)
    assert p[0] < 1
    assert np.isnan(p[1])


def test_epsilon_of_zero(dtype: str) -> None:
    # 0 / 0 where the gradient was 0, and m / 0 where its square underflows.
    p, *_ = trained(dtype, [0.5, 0.0, np.sqrt(tiny(dtype))], epsilon=0.0)
    assert p[0] < 1
    is_same(p[1:], [NAN, -INF])


def test_beta_next_to_one(dtype: str) -> None:
    beta = 1 - 2.0**-53
    p, m, v, _ = trained(dtype, [0.5, -0.5], beta_1=beta, beta_2=beta)
    is_same(np.array([m, v]), [[2.0**-54, -(2.0**-54)], [2.0**-55, 2.0**-55]])
    # (sqrt(2^-53) / 2^-53) * 2^-54 / (2^-27.5 + epsilon)
    np.testing.assert_allclose(1 - p[0], 0.001 * 2**-27.5 / (2**-27.5 + 1e-8), 1e-4)


def test_decay_that_overflows(dtype: str) -> None:
    first, *_ = trained(dtype, [0.5, -0.5], decay=1e308)
    assert first[0] < 1  # the first step does not decay
    is_same(trained(dtype, [0.5, -0.5], steps=4, decay=1e308)[0], first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, INF) for name in ("lr", "epsilon", "decay", "clipnorm")),
        *(("lr", NAN), ("weight_decay", NAN), ("beta_1", 1.0)),
        *(("loss_scale", 2.0**128), ("loss_scale", 0.0)),
    ],
)
def test_hyper_parameter_that_is_not_finite_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .* Received: {name}="):
        Adam(**{name: value})
