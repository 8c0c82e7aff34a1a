# SPDX-License-Identifier: MIT
"""`iterations` from 0 to 2**53: its effect on a step, and that it is stored exactly.

A count that passes through 32 bits, a float32, or a double beyond 2**53 would change.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from fusedadam import Adam, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, state, values

# Around the last exact integers of float32, of 32 bits, and of float64.
COUNTS = [
    0,
    1,
    2**24 - 1,
    2**24,
    2**24 + 1,
    2**31 - 2,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53 - 2,
    2**53 - 1,
    2**53,
]
NEARLY_1 = 1 - 2.0**-53
# Betas whose powers still change at counts this large.
BETAS = [0.9, 0.999, 1 - 2.0**-24, 1 - 2.0**-31, 1 - 3 * 2.0**-42, NEARLY_1]


def counted(count: Any, **options: Any) -> tuple[Adam, Array]:
    """An optimizer that has taken `count` steps, and its parameter."""
    p, _, m, v = state(np.random.default_rng(3), 40, "float64")
    adam = Adam(**options)
    adam.build([p])
    adam.set_weights([count, m, v])
    return adam, p


# -- exact storage ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", [int, np.int64, np.uint64, np.float64, np.array])
def test_count_is_taken_and_given_back_exactly(count: int, kind: Callable[[int], Any]) -> None:
    adam, _ = counted(kind(count))
    assert adam.iterations == count
    weight = adam.weights[0]
    assert weight.dtype == np.int64
    assert weight.shape == ()
    assert weight == count
    assert adam.get_weights()[0] == count
    other, _ = counted(0)
    other.set_weights(adam.get_weights())
    assert other.iterations == count


@pytest.mark.parametrize("count", COUNTS)
def test_count_survives_copies_and_files(count: int, tmp_path: Path) -> None:
    adam, p = counted(count)
    path = tmp_path / "adam.safetensors"
    adam.save(path)
    others = [Adam.load(path, [p]), copy.copy(adam), copy.deepcopy(adam)]
    others += [
        pickle.loads(pickle.dumps(adam, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    assert [other.iterations for other in others] == [count] * len(others)
    adam.build([p])
    assert adam.iterations == count


@pytest.mark.parametrize(
    "count",
    [
        -1,
        -(2**63),
        2**53 + 1,
        2**63 - 1,
        np.uint64(2**63),
        np.uint64(2**64 - 1),
        0.5,
        -1.0,
        2.0**53 + 2,
        2.0**63,
        1e300,
        math.inf,
        math.nan,
    ],
)
def test_count_out_of_range_is_refused(count: Any) -> None:
    adam, p = counted(7)
    before = [p.copy(), *adam.get_weights()]
    message = r"^weights\[0\] must be a count of steps, an integer from 0 to 2\*\*53\. Received: "
    with pytest.raises(ValueError, match=message):
        adam.set_weights([count, *adam.get_weights()[1:]])
    assert_all_same_bits([p, *adam.weights], before)


@pytest.mark.parametrize("step", [0, -1, 2**53 + 2, 2**63 - 1, 2**63, -(2**63) - 1])
def test_step_out_of_range_is_refused(step: int) -> None:
    arrays = [np.ones(3) for _ in range(4)]
    with pytest.raises(ValueError, match=rf"^step must .*\. Received: step={step}"):
        adam_step(*arrays, step=step)
    assert_all_same_bits(arrays, [np.ones(3)] * 4)


# -- effect on a step -------------------------------------------------------------------------

# Enough steps for the count to pass the number.
STEPS = 4


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [count for count in COUNTS if count >= STEPS])
def test_training_passes_the_count(rng: np.random.Generator, dtype: str, last: int) -> None:
    first = last - STEPS
    for beta_1, beta_2 in [*zip(BETAS, BETAS[::-1], strict=True), *((0.9, b) for b in BETAS)]:
        options: dict[str, Any] = {
            "lr": 0.3,
            "beta_1": beta_1,
            "beta_2": beta_2,
            # A decay that halves lr, apart from the effect of one more step.
            "decay": 1 / (first + 1),
            "bias_corrected_epsilon": True,
        }
        p, _, m, v = state(rng, 30, dtype)
        adam, expected = Adam(**options), oracle.OracleAdam([p], **options)
        expected.set_count(first)
        expected.m, expected.v = [m], [v]
        adam.build([p])
        adam.set_weights(expected.weights())
        for count in range(first + 1, last + 1):
            g = values(rng, 30, dtype)
            expected.step([g])
            assert adam.apply_gradients([(g, p)]) == count
            assert_all_same_bits([p, *adam.weights], [*expected.params, *expected.weights()])


@pytest.mark.parametrize("count", [2**53 - 1, 2**53])
def test_count_stays_at_its_last(rng: np.random.Generator, count: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta_2": NEARLY_1, "decay": 2.0**-53}
    p, _, m, v = state(rng, 30, "float64")
    adam, expected = Adam(**options), oracle.OracleAdam([p], **options)
    expected.set_count(count)
    expected.m, expected.v = [m], [v]
    adam.build([p])
    adam.set_weights(expected.weights())
    for _ in range(3):
        g = values(rng, 30, "float64")
        expected.step([g])
        assert adam.apply_gradients([(g, p)]) == 2**53
        assert_all_same_bits([p, *adam.weights], [*expected.params, *expected.weights()])
        # The resulting state is valid: it survives files and pickles.
        adam.save(tmp_path / "adam.safetensors")
        adam = Adam.load(tmp_path / "adam.safetensors", [p])
        adam = pickle.loads(pickle.dumps(adam))
        adam.set_weights(adam.get_weights())


@pytest.mark.parametrize("count", COUNTS[:-1])
def test_schedule_is_asked_for_the_exact_count(count: int) -> None:
    asked = []

    def schedule(iterations: int) -> float:
        asked.append(iterations)
        return 0.001

    adam, p = counted(count, lr=schedule)
    assert adam.apply_gradients([(np.ones_like(p), p)]) == count + 1
    assert asked == [count]
    assert type(asked[0]) is int


@pytest.mark.parametrize("count", [2**24, 2**31, 2**32, 2**53])
def test_parameters_are_overwritten_at_the_very_step(count: int) -> None:
    adam, p = counted(count - 2, use_ema=True, ema_overwrite_frequency=count)
    overwritten = []
    for _ in range(2):
        adam.apply_gradients([(np.ones_like(p), p)])
        overwritten.append(np.array_equal(p, adam.ema[0]))
    assert overwritten == [False, True]


@pytest.mark.parametrize("count", [2**31 - 2, 2**31 - 1, 2**32])
def test_sparse_steps_count_as_dense_ones(rng: np.random.Generator, count: int) -> None:
    table, rows, indices = values(rng, (9, 3), "float32"), values(rng, (4, 3), "float32"), [1, 5, 1]
    options: dict[str, Any] = {"beta_2": 1 - 2.0**-31, "decay": 2.0**-31}
    for lazy in (True, False):
        p = table.copy()
        expected = oracle.OracleAdam([p], **options)
        expected.set_count(count)
        adam = Adam(**options)
        adam.build([p])
        adam.set_weights(expected.weights())
        for taken in range(count + 1, count + 4):
            expected.apply_sparse(np.array(indices), rows[:3], lazy=lazy)
            assert adam.apply_sparse(np.array(indices), rows[:3], p, lazy=lazy) == taken
        assert_all_same_bits([p, *adam.weights], [*expected.params, *expected.weights()])


# -- the oracle's own powers ------------------------------------------------------------------


def enclosed_power(beta: float, t: int) -> tuple[float, float]:
    """Return two floats that enclose ``beta**t`` and are almost always equal.

    Uses integers of about 400 bits, and rounds each product once down and once up. So the result
    does not rely on an error estimate.
    """
    width = 400
    numerator, denominator = beta.as_integer_ratio()
    # Normalised to bounds * 2**exponent, so that a small power keeps its digits.
    base = (numerator << width, numerator << width, -(denominator.bit_length() - 1) - width)

    def times(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
        low, high, exponent = a[0] * b[0], a[1] * b[1], a[2] + b[2]
        excess = low.bit_length() - width
        return low >> excess, -(-high >> excess), exponent + excess

    result = None
    for digit in f"{t:b}":
        if result is not None:
            result = times(result, result)
        if digit == "1":
            result = base if result is None else times(result, base)
    assert result is not None
    low, high, exponent = result
    if exponent + width < -2_000:
        return 0.0, 0.0
    scale = Fraction(2) ** exponent
    return float(low * scale), float(high * scale)


@pytest.mark.parametrize("beta", [*BETAS, 0.5, 0.1, 1e-300, 5e-324, 0.99999, 1 - 2.0**-45])
def test_powers_of_the_oracle_lie_within_an_enclosure(beta: float) -> None:
    counts = [t for count in COUNTS for t in (count, count + 1)]
    # Also where the oracle switches methods, and where the power is near 1/2.
    counts += [1_499, 1_500, 1_501, 1_502, *(3 + 7 * count // 10 for count in COUNTS)]
    if beta > 0.5:
        counts.append(math.ceil(math.log(0.5) / math.log1p(beta - 1)))
    for t in filter(None, counts):
        low, high = enclosed_power(beta, t)
        assert low == oracle.power(beta, t) == high, t
