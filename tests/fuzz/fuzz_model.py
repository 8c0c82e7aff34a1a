# SPDX-License-Identifier: MIT
"""What an optimizer must be after any program of calls: the oracle, and what it is asked to keep."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from fuzz_values import ALWAYS, STRUCTURAL, TensorSpec, conflict
from guarded import Guarded, Place
from helpers import Array, assert_all_same_bits
from oracle import OracleAdam

DEFAULTS: Final[dict[str, Any]] = {
    name: parameter.default
    for name, parameter in inspect.signature(OracleAdam).parameters.items()
    if name not in ("params", "excluded")
}

# 1 is as good as None.
_COUNT: Final = "gradient_accumulation_steps"


class Parameters:
    """Arrays between guard pages, and what is to be in them."""

    def __init__(self, expected: Sequence[Array], placed: Iterable[Place]) -> None:
        self.expected = list(expected)
        self.places = list(placed)
        self.held = [Guarded(x, place) for x, place in zip(expected, self.places, strict=True)]
        self.arrays = [held.array for held in self.held]

    @property
    def specs(self) -> list[TensorSpec]:
        return [(a.shape, str(a.dtype), p) for a, p in zip(self.arrays, self.places, strict=True)]

    def check(self) -> None:
        assert_all_same_bits(self.arrays, self.expected, "params")
        for held in self.held:
            held.assert_canaries_alive()


class Model:
    """The oracle, from the settings alone through its state to averages that are swapped in."""

    def __init__(self, **options: Any) -> None:
        self.oracle = OracleAdam([], **options)
        self.is_built = False
        self.is_swapped = False
        # The parameters of the last call that was not refused, with which averages are swapped.
        self.bound: Parameters | None = None
        # Arrays to be found among the parameters of the next step; None where there are none.
        self.to_exclude: list[Array] | None = None

    # ---- settings

    def config(self) -> dict[str, Any]:
        now = {name: getattr(self.oracle, name) for name in DEFAULTS}
        if now[_COUNT] == 1:
            now[_COUNT] = None
        return {
            name: value
            for name, value in now.items()
            if name in ALWAYS or value != DEFAULTS[name] or value is not DEFAULTS[name] is None
        }

    def can_set(self, name: str, value: Any) -> bool:
        now = {n: getattr(self.oracle, n) for n in DEFAULTS}
        is_other = (value or 1) != (now[name] or 1) if name == _COUNT else value != now[name]
        if self.is_built and name in STRUCTURAL and is_other:
            return False
        return not conflict(now | {name: value})

    # ---- whether a call is to be refused

    def positions(self, params: Parameters) -> set[int] | None:
        """Positions that do not decay; None where an array to be excluded is none of these."""
        if self.to_exclude is None:
            return self.oracle.excluded
        by_identity = {id(array): i for i, array in enumerate(params.arrays)}
        found = [by_identity.get(id(array)) for array in self.to_exclude]
        return None if None in found else {i for i in found if i is not None}

    def refuses_step(self, params: Parameters) -> bool:
        return self.is_swapped or self.positions(params) is None

    def refuses_build(self, params: Parameters) -> bool:
        positions = self.positions(params)
        if self.is_swapped or positions is None:
            return True
        return any(position >= len(params.arrays) for position in positions)

    # ---- calls that are not refused

    def build(self, params: Parameters) -> None:
        self._begin(params)
        self._accept(params)

    def step(self, params: Parameters, grads: Sequence[Array]) -> list[Array]:
        """Take one call; the gradients as it leaves them."""
        self._before(params)
        left = self.oracle.step(grads)
        params.expected = self.oracle.params
        return left

    def step_rows(
        self, params: Parameters, indices: Array, grad_rows: Array, *, lazy: bool
    ) -> Array:
        self._before(params)
        left = self.oracle.apply_sparse(indices, grad_rows, lazy=lazy)
        params.expected = self.oracle.params
        return left

    def swap_ema(self) -> None:
        assert self.bound is not None
        self.bound.expected, self.oracle.ema = self.oracle.ema, self.bound.expected
        self.is_swapped = not self.is_swapped

    def copied(self, *, is_deep: bool) -> None:
        """The optimizer is now a copy: of the parameters it knows nothing."""
        self.bound = None
        if self.to_exclude and is_deep:
            self.to_exclude = [np.zeros(0)]  # copies too, that are nobody's parameters

    def loaded(self, params: Parameters) -> None:
        if not self.is_built:
            self._begin(params)
        self._accept(params)

    def _before(self, params: Parameters) -> None:
        if not self.is_built:
            self._begin(params)
        self._accept(params)
        self.oracle.params = params.expected

    def _begin(self, params: Parameters) -> None:
        oracle = self.oracle
        zeros = [np.zeros_like(x) for x in params.expected]
        oracle.m, oracle.v = zeros, [x.copy() for x in zeros]
        oracle.vhat = [x.copy() for x in zeros] if oracle.amsgrad else []
        oracle.ema = [x.copy() for x in params.expected] if oracle.use_ema else []
        oracle.accumulators = []
        oracle.accumulated = 0
        self.is_built = True

    def _accept(self, params: Parameters) -> None:
        positions = self.positions(params)
        assert positions is not None
        self.oracle.excluded = positions
        self.to_exclude = None
        self.bound = params

    # ---- what is to be seen

    def weights(self) -> list[Array]:
        return self.oracle.weights() if self.is_built else []

    def ema(self) -> list[Array]:
        return self.oracle.ema if self.is_built else []

    def progress(self) -> dict[str, Any]:
        names = ("iterations", "skipped_steps", "accumulated", "dynamic_loss_scale", "good_steps")
        return {name: getattr(self.oracle, name) for name in names}
