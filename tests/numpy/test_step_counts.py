# SPDX-License-Identifier: MIT
"""`iterations` from 0 to 2**53: its effect on a step, and that it is stored exactly.

A count that passes through 32 bits, a float32, or a double beyond 2**53 would change.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from fusedadam import Adam, adam_step
from helpers import FLOATS, Array, assert_all_same_bits, assert_same_bits, state, values

# Around the last exact integers of float32, of 32 bits, and of float64.
COUNTS = (
    *(0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53 - 2, 2**53 - 1, 2**53),
)
NEARLY_1 = 1 - 2.0**-53
# Betas whose powers still change at counts this large.
BETAS = [0.9, 0.999, 1 - 2.0**-24, 1 - 2.0**-31, 1 - 3 * 2.0**-42, NEARLY_1]


def counted(
    count: Any, dtype: str = "float64", **options: Any
) -> tuple[Adam, Array, oracle.OracleAdam]:
    """An optimizer that has taken `count` steps, its parameter, and its oracle."""
    p, _, m, v = state(np.random.default_rng(3), 40, dtype)
    adam, reference = Adam(**options), oracle.OracleAdam([p], **options)
    reference.m, reference.v = [m], [v]
    reference.set_count(int(count))
    adam.build([p])
    adam.set_weights([count, m, v])
    return adam, p, reference


# -- exact storage ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_count_is_taken_kept_and_given_back_exactly(count: int, path: Path) -> None:
    for kind in (int, np.int64, np.uint64, np.float64, np.array):
        adam, p, _ = counted(kind(count))
        weight = adam.weights[0]
        assert adam.iterations == count == adam.get_weights()[0], kind
        assert_same_bits(weight, np.array(count, np.int64), str(kind))
    other, _, _ = counted(0)
    other.set_weights(adam.get_weights())
    adam.save(path)
    others = [other, Adam.load(path, [p]), copy.copy(adam), copy.deepcopy(adam)]
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    others += [pickle.loads(pickle.dumps(adam, protocol)) for protocol in protocols]
    adam.build([p])
    assert [each.iterations for each in (adam, *others)] == [count] * (1 + len(others))


def test_step_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"^step must .*\. Received: step={2**53 + 2}"):
        adam_step(*np.ones((4, 3)), step=2**53 + 2)


# -- effect on a step -------------------------------------------------------------------------

# Enough steps for the count to pass the number.
STEPS = 4


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [count for count in COUNTS if count >= STEPS])
def test_training_passes_the_count(rng: np.random.Generator, dtype: str, last: int) -> None:
    first = last - STEPS
    for beta_1, beta_2 in [*zip(BETAS, BETAS[::-1], strict=True), *((0.9, b) for b in BETAS)]:
        adam, p, expected = counted(
            first,
            dtype=dtype,
            lr=0.3,
            beta_1=beta_1,
            beta_2=beta_2,
            decay=1 / (first + 1),  # halves lr, apart from the effect of one more step
            bias_corrected_epsilon=True,
        )
        for count in range(first + 1, last + 1):
            g = values(rng, 40, dtype)
            expected.step([g])
            assert adam.apply_gradients([(g, p)]) == count
            assert_all_same_bits([p, *adam.weights], [*expected.params, *expected.weights()])


@pytest.mark.parametrize("count", [2**53 - 1, 2**53])
def test_count_stays_at_its_last(rng: np.random.Generator, count: int, path: Path) -> None:
    adam, p, expected = counted(count, beta_2=NEARLY_1, decay=2.0**-53)
    for _ in range(3):
        g = values(rng, 40, "float64")
        expected.step([g])
        assert adam.apply_gradients([(g, p)]) == 2**53
        assert_all_same_bits([p, *adam.weights], [*expected.params, *expected.weights()])
        # The resulting state is valid: it survives files and pickles.
        adam.save(path)
        adam = pickle.loads(pickle.dumps(Adam.load(path, [p])))
        adam.set_weights(adam.get_weights())


@pytest.mark.parametrize("count", [2**24, 2**31, 2**32, 2**53])
def test_parameters_are_overwritten_at_the_very_step(count: int) -> None:
    adam, p, _ = counted(count - 2, use_ema=True, ema_overwrite_frequency=count)
    overwritten = []
    for _ in range(2):
        adam.apply_gradients([(np.ones_like(p), p)])
        overwritten.append(np.array_equal(p, adam.ema[0]))
    assert overwritten == [False, True]
