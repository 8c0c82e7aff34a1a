# SPDX-License-Identifier: MIT
"""A training with an oracle beside it, for all tests of the NumPy front end and its files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import fusedadam
import numpy as np
import oracle
from fusedadam import Adam
from helpers import Array, assert_all_same_bits, assert_same_bits, values

ShapesAndDtypes: TypeAlias = Sequence[tuple[tuple[int, ...], str]]
FEW: ShapesAndDtypes = [
    ((3, 5), "float32"),
    ((7,), "float64"),
    ((), "float32"),
    ((0, 2), "float64"),
]


class Training:
    """An optimizer, its parameters, and an oracle that sees the same gradients.

    Parameters at the positions `excluded` do not decay. `own` maps positions to settings. A
    gradient of None freezes its parameter.
    """

    def __init__(
        self,
        shapes_and_dtypes: ShapesAndDtypes = FEW,
        *,
        seed: int = 5,
        excluded: Iterable[int] = (),
        own: Mapping[int, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.params = [values(self.rng, *of) for of in shapes_and_dtypes]
        excluded, own = list(excluded), own or {}
        self.reference = oracle.OracleAdam(self.params, excluded=excluded, own=own, **options)
        self.optimizer = Adam(**options)
        for position, settings in own.items():
            self.optimizer.override([self.params[position]], **settings)
        if excluded:
            self.optimizer.exclude_from_weight_decay([self.params[i] for i in excluded])

    def grads(self, dtype: str | None = None) -> list[Array]:
        """Draw gradients, of this dtype for parameters of at most 32 bits."""
        dtypes = [str(p.dtype if p.dtype == np.float64 else dtype or p.dtype) for p in self.params]
        pairs = zip(self.params, dtypes, strict=True)
        return [values(self.rng, p.shape, each) for p, each in pairs]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.call(self.grads())

    def call(self, grads: Sequence[Array | None]) -> None:
        """Apply these gradients and check that the call leaves them as the oracle does."""
        self.call_by("apply_gradients", grads)

    def call_by(
        self, by: str, grads: Sequence[Any], *, as_seen: Sequence[Array] | None = None
    ) -> None:
        """Do the same by the method of this name, also "step" or "get_updates".

        If the step converts the gradients, the oracle gets them as the step sees them, `as_seen`.
        """
        left = self.reference.step(grads if as_seen is None else as_seen)
        if by == "apply_gradients":
            count = self.optimizer.apply_gradients(list(zip(grads, self.params, strict=True)))
        elif by == "step":
            count = self.optimizer.step(self.params, list(grads))
        else:
            count, *_ = self.optimizer.get_updates(list(grads), self.params)
        assert count == self.reference.iterations
        if as_seen is None:
            there = [g for g in grads if g is not None]
            assert_all_same_bits(there, [g for g in left if g is not None], "grads after the call")

    def call_rows(self, indices: Any, rows: Array, *, lazy: bool = True) -> None:
        """Apply gradients of rows of the only parameter, and check that and what the call leaves."""
        (table,) = self.params
        kept = np.array(indices)
        left = self.reference.apply_sparse(kept, rows, lazy=lazy)
        count = self.optimizer.apply_sparse(indices, rows, table, lazy=lazy)
        assert count == self.reference.iterations
        assert_same_bits(rows, left, "grad_rows after the call")
        assert_same_bits(np.array(indices), kept, "indices")
        self.check()

    def check(self) -> None:
        optimizer, reference = self.optimizer, self.reference
        assert_all_same_bits(self.params, reference.params, "params")
        assert_all_same_bits(optimizer.weights, reference.weights(), "weights")
        assert_all_same_bits(optimizer.ema, reference.ema, "ema")
        low_bits = optimizer._state.slots.get("low_bits", [])
        for ours, theirs in zip(low_bits, reference.low_bits or [], strict=True):
            assert (ours is None) == (theirs is None), "low_bits"
            if ours is not None:
                assert_same_bits(ours, theirs, "low_bits")
        assert optimizer.iterations == reference.iterations
        assert not optimizer._state.is_built or optimizer._state.steps == reference.steps
        assert optimizer.skipped_steps == reference.skipped_steps
        assert optimizer.current_loss_scale == reference.current_loss_scale

    def resumed(self, path: Path) -> Training:
        """Save, and go on from the file with parameters of its own. A schedule is given again."""
        self.optimizer.save(path)
        other = copy.copy(self)
        other.rng, other.reference = copy.deepcopy((self.rng, self.reference))
        other.params = [param.copy() for param in self.params]
        schedule = self.optimizer.lr if callable(self.optimizer.lr) else None
        other.optimizer = Adam.load(path, other.params, lr=schedule)
        return other

    def visible(self) -> dict[str, Any]:
        """Copy all that a user can see of it and of the process, which a refused call leaves."""
        optimizer = self.optimizer
        return {
            "params": [p.copy() for p in self.params],
            "weights": [w.copy() for w in optimizer.weights],
            "ema": [a.copy() for a in optimizer.ema],
            "iterations": optimizer.iterations,
            "skipped_steps": optimizer.skipped_steps,
            "current_loss_scale": optimizer.current_loss_scale,
            # A schedule without an importable name has no configuration.
            "config": None if callable(optimizer.lr) else optimizer.get_config(),
            "repr": repr(optimizer),
            "isa": fusedadam.active_isa(),
            "threads": fusedadam.get_num_threads(),
        }

    def assert_as(self, before: Mapping[str, Any]) -> None:
        """Fail unless `visible` is still the same."""
        after = self.visible()
        for what, old in before.items():
            if isinstance(old, list):
                assert_all_same_bits(after[what], old, what)
            else:
                assert after[what] == old, what
