# SPDX-License-Identifier: MIT
"""The kernel equals the oracle bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from fusedadam import Adam, adam_step
from helpers import (
    FLOATS,
    Array,
    Placed,
    assert_all_same_bits,
    assert_same_bits,
    running,
    state,
    values,
)

# Around every vector width (4 to 16 lanes), the tile (1,024) and multiples of it.
LENGTHS = [0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1000, 1023, 1024, 1025, 2047, 2049, 4097]
# Offsets in elements from a 64-byte boundary.
OFFSETS = [0, 1, 5]
# Smaller steps run on the calling thread only.
PARALLEL = 70_001
# The largest step whose previous count is exact in float64.
LAST_STEP = 2**53 + 1


def check_step(
    arrays: tuple[Array, Array, Array, Array],
    *,
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    step: int,
    **options: Any,
) -> None:
    """Compare one `adam_step` on one tensor with the oracle, and check the memory around it."""
    p, g, m, v = placed = [Placed(x, k) for x, k in zip(arrays, offsets, strict=True)]
    expected = oracle.adam_step(*arrays, step=step, **options)
    adam_step(p.array, g.array, m.array, v.array, step=step, **options)
    for name, actual, e in zip("pmv", (p, m, v), expected, strict=True):
        assert_same_bits(actual.array, e, name)
    assert_same_bits(g.array, arrays[1], "g")
    for x in placed:
        x.assert_canaries_alive()


# -- one tensor -------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("n", LENGTHS)
def test_step_equals_oracle(rng: np.random.Generator, n: int, offset: int, dtype: str) -> None:
    arrays = state(rng, n, dtype)
    check_step(arrays, offsets=(offset,) * 4, step=1)
    # Each array has another offset, so no loop can align them all.
    check_step(arrays, offsets=(offset, offset + 1, offset + 2, offset + 3), step=7, lr=0.1)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [PARALLEL, 3 * 32_768, 131_073])
def test_parallel_step_equals_oracle(rng: np.random.Generator, n: int, dtype: str) -> None:
    check_step(state(rng, n, dtype), offsets=(1, 0, 3, 2), step=3)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 1), (5, 7), (2, 3, 4, 5)])
def test_any_shape(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    check_step(state(rng, shape, dtype), step=2)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", [True, False])
def test_every_combination_of_special_numbers(dtype: str, flush_denormals: bool) -> None:
    info = np.finfo(dtype)
    tiny, last = float(info.smallest_normal), float(info.smallest_subnormal)
    # 1.0625 * tiny is a normal moment that beta_1 reduces to below the smallest normal number.
    magnitudes = [0.0, last, tiny / 2, tiny, 1.0625 * tiny, 1.0, float(info.max), np.inf]
    special = [*magnitudes, *(-x for x in magnitudes), np.nan]
    p, g, m, v = (
        np.array(x, dtype) for x in zip(*itertools.product(special, repeat=4), strict=True)
    )
    check_step((p, g, m, v), step=4, flush_denormals=flush_denormals)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", [True, False])
def test_moments_around_the_smallest_normal(
    rng: np.random.Generator, dtype: str, flush_denormals: bool
) -> None:
    T = np.dtype(dtype).type
    tiny = np.finfo(dtype).smallest_normal
    p, _, m, v = (
        np.asarray(T(scale) * rng.uniform(low, 4, 3001).astype(dtype))
        for scale, low in ((1, -4), (1, 0), (tiny, -4), (tiny, 0))
    )
    zero = np.zeros_like(p)
    check_step((p, zero, m, v), step=9, epsilon=0.0, flush_denormals=flush_denormals)
    adam_step(p, zero, m, v, step=10, flush_denormals=flush_denormals)
    for moment in (m, v):
        subnormal = (moment != 0) & (np.abs(moment) < tiny)
        assert subnormal.any() != flush_denormals


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": 1e30},
        {"lr": 5e-324},
        {"lr": 1e300},
        {"epsilon": 0.0},
        {"epsilon": 1e-50},
        {"epsilon": 1e300},
        {"beta_1": 5e-324, "beta_2": 5e-324},
        {"beta_1": 1 - 2**-53, "beta_2": 1 - 2**-53},
        {"beta_1": 1 - 2**-53, "beta_2": 0.5},
        {"beta_1": 0.5, "beta_2": 1 - 2**-53},
        {"beta_1": 0.1, "beta_2": 0.3, "lr": 0.7, "epsilon": 1e-3},
    ],
    ids=str,
)
def test_extreme_hyper_parameters(
    rng: np.random.Generator, dtype: str, options: dict[str, Any]
) -> None:
    for step in (1, 2, 1000):
        check_step(state(rng, 333, dtype), step=step, **options)


# -- beta**t ----------------------------------------------------------------------------------


def check_lr_t(rng: np.random.Generator, step: int, beta_1: float, beta_2: float) -> None:
    """Compare the learning rate of a step with the oracle through 16 products.

    A wrong last bit of the learning rate changes nearly every product, here the new parameters.
    """
    zero, m = np.zeros(16), rng.uniform(1, 2, 16)
    arrays = (zero, zero, m, zero)
    check_step(arrays, step=step, lr=1.0, beta_1=beta_1, beta_2=beta_2, epsilon=1.0)


@pytest.mark.parametrize("beta_2", [0.999, 0.99, 0.9, 0.5, 0.1, 1 - 2**-20])
@pytest.mark.parametrize("beta_1", [0.9, 0.5])
def test_bias_correction_of_the_first_thousands_of_steps(
    rng: np.random.Generator, beta_1: float, beta_2: float
) -> None:
    for step in [*range(1, 400), *range(400, 20_000, 997)]:
        check_lr_t(rng, step, beta_1, beta_2)


@pytest.mark.parametrize("step", [10**6, 2**31 - 1, 2**31 + 1, 2**53 - 1, 2**53, LAST_STEP])
@pytest.mark.parametrize(
    "beta",
    [0.999, 1 - 2**-20, 1 - 2**-31, 1 - 3 * 2**-42, 1 - 2**-50, 1 - 3 * 2**-53, 1 - 2**-53],
)
def test_bias_correction_of_a_long_training(
    rng: np.random.Generator, step: int, beta: float
) -> None:
    check_lr_t(rng, step, 0.5, beta)
    check_lr_t(rng, step, beta, 0.5)


def test_power_is_correctly_rounded_far_out(rng: np.random.Generator) -> None:
    # Powers from 0.05 to 0.8: a wrong last bit often survives the subtraction and the root.
    for _ in range(200):
        beta = 1.0 - float(np.exp2(rng.uniform(-52, -5)))
        step = max(1, int(float(rng.uniform(0.2, 3.0)) / (1.0 - beta)))
        check_lr_t(rng, step, 0.5, beta)
        check_lr_t(rng, step, beta, 0.5)


# Powers within 0.001 units in the last place of the midpoint between two floats. A less precise
# computation rounds them in the wrong direction: glibc 2.36 does so for eight of them.
HARD_POWERS = [
    (0.9997, 1_078),
    (0.99975, 389),
    (0.99975, 572),
    (0.9999, 494),
    (0.9999, 1_733),
    (0.9999, 2_258),
    (0.99999, 7_487),
    (0.99999, 37_114),
    (0.99999, 48_419),
    (0.999999, 7_577),
    (0.999999, 114_953),
    (0.999999, 489_224),
]


@pytest.mark.parametrize(("beta", "step"), HARD_POWERS)
def test_hard_powers(rng: np.random.Generator, beta: float, step: int) -> None:
    check_lr_t(rng, step, 0.5, beta)
    check_lr_t(rng, step, beta, 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("step", [10**6, 2**31 + 1, 2**53])
def test_long_training(rng: np.random.Generator, dtype: str, step: int) -> None:
    check_step(state(rng, 100, dtype), step=step, beta_2=1 - 2**-40)


# -- several tensors --------------------------------------------------------------------------

SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((3, 5), "float32"),
    ((), "float64"),
    ((0,), "float32"),
    ((1023,), "float64"),
    ((2, 0, 3), "float64"),
    ((), "float32"),
    ((1025,), "float32"),
    ((64, 33), "float64"),
    ((1,), "float32"),
    ((4099,), "float32"),
]
LARGE = [*SHAPES, ((PARALLEL,), "float32"), ((7, 9_001), "float64"), ((50_000,), "float32")]


@pytest.mark.usefixtures("isa", "threads")
def test_lists_of_tensors(rng: np.random.Generator) -> None:
    states = [state(rng, shape, dtype) for shape, dtype in LARGE]
    p, g, m, v = ([x.copy() for x in column] for column in zip(*states, strict=True))
    adam_step(p, g, m, v, step=5, lr=0.02)
    for i, arrays in enumerate(states):
        expected = oracle.adam_step(*arrays, step=5, lr=0.02)
        assert_all_same_bits([p[i], m[i], v[i]], expected, f"tensor {i}: [p, m, v]")
        assert_same_bits(g[i], arrays[1], f"g[{i}]")


@pytest.mark.usefixtures("isa", "threads")
def test_many_small_tensors(rng: np.random.Generator) -> None:
    # 900 tensors, most of them shorter than a tile. The threads' shares begin inside the list.
    states = [state(rng, int(n), FLOATS[int(n) % 2]) for n in rng.integers(0, 130, 900)]
    p, g, m, v = ([x.copy() for x in column] for column in zip(*states, strict=True))
    adam_step(p, g, m, v, step=2)
    expected = [oracle.adam_step(*arrays, step=2) for arrays in states]
    for name, actual, e in zip("pmv", (p, m, v), zip(*expected, strict=True), strict=True):
        assert_all_same_bits(actual, e, name)


def test_no_tensors() -> None:
    assert adam_step([], [], [], [], step=1) is None


# -- whole optimizers -------------------------------------------------------------------------

Loop = Callable[[Adam, list[Array], list[Array]], None]


def by_apply(adam: Adam, params: list[Array], grads: list[Array]) -> None:
    adam.apply_gradients(zip(grads, params, strict=True))


def by_updates(adam: Adam, params: list[Array], grads: list[Array]) -> None:
    adam.get_updates(grads, params)


def by_clipped_copies(adam: Adam, params: list[Array], grads: list[Array]) -> None:
    """Clip with `get_gradients`, then step an optimizer that does not clip."""
    clipped = adam.get_gradients(grads, params)
    clipnorm, clipvalue = adam.clipnorm, adam.clipvalue
    adam.clipnorm = adam.clipvalue = None
    adam.apply_gradients(zip(clipped, params, strict=True))
    adam.clipnorm, adam.clipvalue = clipnorm, clipvalue


OPTIONS: list[dict[str, Any]] = [
    {},
    {"decay": 0.3},
    {"clipnorm": 1.0},
    {"clipnorm": 1e-30},
    {"clipnorm": 1e30},
    {"clipnorm": 0.0, "clipvalue": 0.0},
    {"clipvalue": 0.05},
    {"clipvalue": 1e300},
    {"clipnorm": 2.0, "clipvalue": 0.01, "decay": 1e-3},
    {"flush_denormals": False, "clipnorm": 1e-38, "epsilon": 1e-20},
    {"lr": 0.3, "beta_1": 0.5, "beta_2": 0.7, "epsilon": 1e-3, "decay": 2.0},
]


def check_training(
    rng: np.random.Generator,
    loop: Loop,
    shapes: list[tuple[tuple[int, ...], str]],
    *,
    steps: int,
    **options: Any,
) -> None:
    params = [values(rng, shape, dtype) for shape, dtype in shapes]
    adam = Adam(**options)
    expected = oracle.OracleAdam(params, **options)
    for _ in range(steps):
        grads = [values(rng, shape, dtype) for shape, dtype in shapes]
        kept = [g.copy() for g in grads]
        loop(adam, params, grads)
        expected.step(kept)
        assert_all_same_bits(grads, kept, "grads")
    assert_all_same_bits(params, expected.params, "params")
    assert_all_same_bits(adam.get_weights(), expected.weights(), "weights")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loop", [by_apply, by_updates, by_clipped_copies])
def test_training_equals_oracle(
    rng: np.random.Generator, loop: Loop, options: dict[str, Any]
) -> None:
    check_training(rng, loop, SHAPES, steps=4, **options)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5, "clipvalue": 1e-3}], ids=str)
def test_parallel_training_equals_oracle(rng: np.random.Generator, options: dict[str, Any]) -> None:
    check_training(rng, by_apply, LARGE, steps=2, **options)


def test_long_training_from_restored_weights(rng: np.random.Generator) -> None:
    p, g, m, v = state(rng, 50, "float64")
    adam = Adam(decay=1e-9)
    adam.build([p])
    adam.set_weights([np.array(2**40), m, v])
    expected = oracle.OracleAdam([p], decay=1e-9)
    expected.m, expected.v = [m], [v]
    expected.set_count(2**40)
    expected.step([g])
    assert adam.apply_gradients([(g, p)]) == 2**40 + 1
    assert_same_bits(p, expected.params[0])


def test_hyper_parameters_may_change_between_steps(rng: np.random.Generator) -> None:
    params = [values(rng, 100, "float32"), values(rng, 40, "float64")]
    adam, expected = Adam(), oracle.OracleAdam(params)
    for change in (
        {"lr": 0.5},
        {"beta_1": 0.3},
        {"beta_2": 0.4},
        {"epsilon": 0.1},
        {"bias_corrected_epsilon": True},
        {"decay": 0.7},
        {"clipnorm": 0.2},
        {"clipvalue": 0.01},
        {"flush_denormals": False},
    ):
        for name, value in change.items():
            setattr(adam, name, value)
            setattr(expected, name, value)
        grads = [values(rng, p.shape, str(p.dtype)) for p in params]
        adam.apply_gradients(zip(grads, params, strict=True))
        expected.step(grads)
        assert_all_same_bits(params, expected.params, f"params after {change}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flush_denormals", [True, False])
def test_moments_of_silent_gradients_decay_like_the_oracle(
    rng: np.random.Generator, dtype: str, flush_denormals: bool
) -> None:
    # From 1e-30 (1e-300) down through the subnormals, until they stay constant or are flushed.
    start = {"float32": 1e-30, "float64": 1e-300}[dtype]
    params = [values(rng, 37, dtype)]
    options: dict[str, Any] = {"beta_2": 0.8, "flush_denormals": flush_denormals}
    adam, expected = Adam(**options), oracle.OracleAdam(params, **options)
    adam.build(params)
    expected.m = [np.asarray(np.linspace(-start, start, 37), dtype)]
    expected.v = [np.asarray(np.linspace(0, start, 37), dtype)]
    adam.set_weights(expected.weights())
    zero = [np.zeros(37, dtype)]
    for _ in range(300):
        adam.apply_gradients(zip(zero, params, strict=True))
        expected.step(zero)
    assert_all_same_bits(adam.get_weights(), expected.weights())
    assert_all_same_bits(params, expected.params)
    left = np.abs(adam.weights[1]).max()
    assert left == 0 if flush_denormals else 0 < left < np.finfo(dtype).smallest_normal


# -- the global norm --------------------------------------------------------------------------


def scale_of(grads: list[Array], clipnorm: float) -> float:
    """Return the clipping factor, read from a gradient of a single float64."""
    *_, probe = Adam(clipnorm=clipnorm).get_gradients([*grads, np.ones(())], [*grads, np.ones(())])
    return float(probe)


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "n", [1, 5, 15, 16, 17, 31, 1023, 1024, 1025, 1040, 5000, PARALLEL, 200_003]
)
def test_global_norm_is_added_in_the_promised_order(
    rng: np.random.Generator, n: int, dtype: str
) -> None:
    # A few large numbers among ones nearly lost beside them, so that the sum depends on the order.
    for _ in range(3):
        g = np.asarray(np.where(rng.random(n) < 20 / n, 2.0**26, rng.uniform(0.5, 2, n)), dtype)
        g *= np.asarray(rng.choice([-1, 1], n), dtype)
        expected = 1.0 / oracle.global_norm([g, np.ones(())])
        assert scale_of([Placed(g, 3).array], 1.0) == expected


@pytest.mark.usefixtures("threads")
def test_global_norm_of_more_than_4096_tiles(rng: np.random.Generator) -> None:
    n = 2 * 4096 * 1024 + 5_000  # blocks of three tiles, the last one short
    g = rng.uniform(0.5, 2, n).astype(np.float32)
    g[rng.integers(0, n, 50)] = 2.0**26
    assert scale_of([g], 1.0) == 1.0 / oracle.global_norm([g, np.ones(())])


@pytest.mark.usefixtures("isa", "threads")
def test_global_norm_over_mixed_tensors(rng: np.random.Generator) -> None:
    grads = [values(rng, shape, dtype) for shape, dtype in LARGE]
    assert scale_of(grads, 1e-3) == 1e-3 / oracle.global_norm([*grads, np.ones(())])


@pytest.mark.parametrize("route", [by_apply, by_updates, by_clipped_copies])
@pytest.mark.parametrize(
    ("clipnorm", "first"),
    [(13.0, 3.0), (np.nextafter(13.0, 14.0), 3.0), (np.nextafter(13.0, 0.0), None), (6.5, 1.5)],
)
def test_clipnorm_at_the_norm_itself(route: Loop, clipnorm: float, first: float | None) -> None:
    grads = [np.array([3.0, 4.0]), np.array([12.0])]
    params = [np.zeros(2), np.zeros(1)]
    adam = Adam(clipnorm=float(clipnorm), beta_1=0.5)
    route(adam, params, grads)
    # With beta_1 = 1/2, m is exactly half of the clipped gradient.
    if first is None:
        assert 2 * adam.weights[1][0] == np.nextafter(3.0, 0.0)
    else:
        assert 2 * adam.weights[1][0] == first


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("odd", [0.0, 1e-45, 1e38, 3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "options", [{"clipnorm": 0.5}, {"clipvalue": 0.5}, {"clipnorm": 0.5, "clipvalue": 0.1}], ids=str
)
def test_clipping_odd_gradients(
    rng: np.random.Generator, dtype: str, odd: float, options: dict[str, Any]
) -> None:
    grads = [values(rng, 40, dtype), values(rng, 7, "float64"), np.zeros(3, "float32")]
    grads[0][[0, 17, 39]] = odd, -odd, 0.0
    params = [np.ones_like(g) for g in grads]
    expected = oracle.OracleAdam(params, **options)
    expected.step(grads)
    adam = Adam(**options)
    clipped = adam.get_gradients(grads, params)
    assert_all_same_bits(clipped, oracle.clip(grads, **options), "clipped")
    adam.apply_gradients(zip(grads, params, strict=True))
    assert_all_same_bits(params, expected.params, "params")
    assert_all_same_bits(adam.get_weights(), expected.weights(), "weights")


def test_norm_that_overflows_float64() -> None:
    grads = [np.array([1e200, 1.0]), np.array([2.0], np.float32)]
    clipped = Adam(clipnorm=1.0).get_gradients(grads, grads)
    assert_all_same_bits(clipped, [np.zeros(2), np.zeros(1, np.float32)])


def test_float32_squares_are_added_in_float64() -> None:
    # In float32, 1e30 squared overflows and 1e-30 squared underflows.
    for x in (1e30, 1e-30):
        g = np.array([x, x], np.float32)
        (clipped,) = Adam(clipnorm=x).get_gradients([g], [g])
        assert clipped[0] == pytest.approx(x * 0.5**0.5, rel=1e-6)


# -- forms of gradients -----------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("clipnorm", [None, 0.5])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "kind", ["strided", "reversed", "transposed", "broadcast", "misaligned", "read-only"]
)
def test_gradients_of_any_layout(
    rng: np.random.Generator, kind: str, dtype: str, clipnorm: float | None
) -> None:
    p = values(rng, (30, 50), dtype)
    layouts: dict[str, Callable[[], Array]] = {
        "strided": lambda: values(rng, (60, 150), dtype)[::2, ::3],
        "reversed": lambda: values(rng, (30, 50), dtype)[::-1, ::-1],
        "transposed": lambda: values(rng, (50, 30), dtype).T,
        "broadcast": lambda: np.broadcast_to(values(rng, (1, 50), dtype), (30, 50)),
        "misaligned": lambda: misaligned(values(rng, (30, 50), dtype)),
        "read-only": lambda: np.broadcast_to(values(rng, (30, 50), dtype), (30, 50)),
    }
    g = layouts[kind]()
    assert g.shape == p.shape
    expected = oracle.OracleAdam([p], clipnorm=clipnorm)
    expected.step([g])
    kept = g.copy()
    adam = Adam(clipnorm=clipnorm)
    adam.apply_gradients([(g, p)])
    assert_same_bits(p, expected.params[0], "p")
    assert_all_same_bits(adam.get_weights(), expected.weights(), "weights")
    assert_same_bits(g, kept, "g")


def misaligned(x: Array) -> Array:
    """Copy to an odd address."""
    copy = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    copy[...] = x
    assert not copy.flags.aligned
    return copy


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [100, PARALLEL])
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_gradients_may_share_memory_with_the_parameter(
    rng: np.random.Generator, n: int, shift: int
) -> None:
    buffer = values(rng, n + shift, "float32")
    p, g = buffer[shift:], buffer[:n]
    _, _, m, v = state(rng, n, "float32")
    expected = oracle.adam_step(p, g, m, v, step=1)
    adam_step(p, g, m, v, step=1)
    assert_all_same_bits([p, m, v], expected)


def test_one_gradient_for_two_parameters(rng: np.random.Generator) -> None:
    g = values(rng, 100, "float32")
    params = [values(rng, 100, "float32") for _ in range(2)]
    expected = oracle.OracleAdam(params, clipnorm=0.1)
    expected.step([g, g])
    Adam(clipnorm=0.1).apply_gradients([(g, p) for p in params])
    assert_all_same_bits(params, expected.params)


# -- threads, instruction sets and errstate ---------------------------------------------------


def test_isas_and_thread_counts_can_be_mixed_within_a_training(rng: np.random.Generator) -> None:
    params = [values(rng, PARALLEL, "float32"), values(rng, 1_000, "float64")]
    adam, expected = Adam(clipnorm=1.0), oracle.OracleAdam(params, clipnorm=1.0)
    for isa, threads in itertools.product(fusedadam.supported_isas(), (1, 2, 3)):
        grads = [values(rng, p.shape, str(p.dtype)) for p in params]
        with running(isa=isa, threads=threads):
            assert fusedadam.active_isa() == isa
            assert fusedadam.get_num_threads() == threads
            adam.apply_gradients(zip(grads, params, strict=True))
        expected.step(grads)
    assert_all_same_bits(params, expected.params, "params")
    assert_all_same_bits(adam.get_weights(), expected.weights(), "weights")


def test_numpy_error_state_is_left_alone() -> None:
    # 0/0, an overflow and an underflow: NumPy would warn or raise, a step does neither.
    with np.errstate(all="raise"):
        p = np.array([1.0, 1.0, 1.0])
        g = np.array([0.0, 1e200, 1e-200])
        adam_step(p, g, np.zeros(3), np.zeros(3), step=1, epsilon=0.0)
    assert np.isnan(p[0])
    assert p[1] == 1.0
