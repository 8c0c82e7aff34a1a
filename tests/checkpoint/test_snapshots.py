# SPDX-License-Identifier: MIT
"""Pickles with wrong contents: an error, whatever they are."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from helpers import Array


def state_with(**changes: Any) -> dict[str, Any]:
    """The contents of a pickle with changed entries. `...` removes one; `m` and `v` are arrays."""
    optimizer = Adam(weight_decay=0.1, gradient_accumulation_steps=2)
    params = [np.ones(3), np.ones((2, 2), "float32")]
    optimizer.step(params, params)
    state = optimizer.__getstate__()
    for name, value in changes.items():
        entries = state["_state"] if name in state["_state"] else state
        entries[name] = value
        if value is ...:
            del entries[name]
    return state


def huge() -> Array:
    array: Array = np.lib.stride_tricks.as_strided(np.zeros(1), (2**40,), (0,))
    return array


COUNTS: dict[str, tuple[Any, ...]] = {
    "steps": ([1], [1] * 3, [-1, 1], [2**70, 1], [0.5, 1], ["1", 1], 5, None),
    "waiting": ([2], [-1], [2**70], [0.5], ["0"], 5, None),
}
POSITIONS = (99, -1, 2**70, 0.5, "0", None)
# A pickle can run any code by design. Wrong contents must still raise an error and not crash.
WRONG: list[dict[str, Any]] = [
    *({name: ...} for name in (*state_with(), "m", "v")),
    *(
        {name: value}
        for name in ("_state", "_options", "_progress", "_own", "_counts")
        for value in (5, "text", [None])
    ),
    *({"_own": ((at,), {})} for at in POSITIONS),
    *({"_own": ((), {at: {"lr": 0.5}})} for at in POSITIONS),
    *(
        {"_own": ((), {0: own})}
        for own in (5, {"lr": "fast"}, {"momentum": 1}, {"lr": 2**5000}, {5: 5})
    ),
    *(
        {"_counts": {"steps": [1, 1], "waiting": [], what: value}}
        for what, values in COUNTS.items()
        for value in values
    ),
    {"_structure": (5,)},
    {"_to_find": (None, [([5], {})])},
    {"_to_find": (None, 5)},
    {"_to_find": ([5], [])},
    {"_schedule": 5},
    *({"v": arrays} for arrays in ([np.ones(3)], [np.ones(3)] * 3, [np.ones(4), np.ones((2, 2))])),
    {"m": []},
    {"m": [np.array([None] * 3), None]},
    {"m": [np.ones(3, "int64"), np.ones((2, 2), "int64")]},
    {"m": [np.ones(3), np.asfortranarray(np.eye(2)[:, ::-1])]},
    {"m": [huge(), np.ones(2)]},
    {"v": [huge(), np.ones(2)]},
]


@pytest.mark.parametrize("changes", WRONG, ids=lambda changes: f"{changes}"[:60])
def test_wrong_state_of_a_pickle_is_an_error(changes: dict[str, Any]) -> None:
    pickled = pickle.dumps(Adam())
    assert pickle.loads(pickled).iterations == 0
    optimizer = Adam.__new__(Adam)
    params = [np.ones(3), np.ones((2, 2), "float32")]
    grads = [np.ones(3), np.ones((2, 2), "float32")]
    errors = (AttributeError, LookupError, MemoryError, TypeError, ValueError)
    with pytest.raises(errors):  # noqa: PT012
        optimizer.__setstate__(state_with(**changes))
        # Some of it only matters for a step.
        optimizer.step(params, grads)
    assert np.all(params[0] == 1)
