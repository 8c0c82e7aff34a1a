# SPDX-License-Identifier: MIT
"""The expected state of an optimizer after any program of calls, according to the oracle."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import storage_oracle as storage
from fuzz_values import STRUCTURAL, TensorSpec, conflict, fitting
from guarded import Guarded, Order, Place
from helpers import Array, assert_all_same_bits
from oracle import OracleAdam

SETTINGS: Final = inspect.signature(OracleAdam).parameters.keys() - {"params", "excluded", "own"}

# The oracle's names of settings, where they differ.
_ATTRIBUTES: Final = {"low_bits": "low_bits_dtype"}

# A value of 1 means the same as None.
_COUNT: Final = "gradient_accumulation_steps"


Own: TypeAlias = tuple[set[int], dict[int, Mapping[str, Any]]]


class Parameters:
    """Arrays between guard pages, and their expected contents."""

    def __init__(
        self, expected: Sequence[Array], placed: Iterable[Place], orders: Iterable[Order]
    ) -> None:
        self.expected, self.places = list(expected), list(placed)
        self.held = list(map(Guarded, self.expected, self.places, orders))
        self.arrays = [held.array for held in self.held]

    @property
    def specs(self) -> list[TensorSpec]:
        return [(a.shape, str(a.dtype), p) for a, p in zip(self.arrays, self.places, strict=True)]

    @property
    def transposed(self) -> set[int]:
        """The positions of the arrays in Fortran order."""
        return {i for i, array in enumerate(self.arrays) if not array.flags.c_contiguous}

    def check(self) -> None:
        assert_all_same_bits(self.arrays, self.expected, "params")
        for held in self.held:
            held.assert_canaries_alive()


class Model:
    """The oracle with the optimizer's whole life cycle, from settings alone to swapped averages."""

    def __init__(self, **options: Any) -> None:
        self.oracle = OracleAdam([], **options)
        self.is_built = False
        self.is_swapped = False
        # The parameters of the last accepted call, with which swap_ema() swaps the averages.
        self.bound: Parameters | None = None
        # Arrays that the next step must find among its parameters, or None.
        self.to_exclude: list[Array] | None = None
        # The same for arrays with their own settings.
        self.to_override: list[tuple[list[Array], dict[str, Any]]] = []
        # The nesting of the parameters of `step` and `minimize`, None before the first call.
        self.structure: str | None = None

    # ---- settings

    def settings(self) -> dict[str, Any]:
        now = {name: getattr(self.oracle, _ATTRIBUTES.get(name, name)) for name in SETTINGS}
        return now | {_COUNT: None if now[_COUNT] == 1 else now[_COUNT]}

    def configure(self, name: str, value: Any) -> None:
        setattr(self.oracle, _ATTRIBUTES.get(name, name), value)

    def can_set(self, name: str, value: Any) -> bool:
        now = self.settings()
        given = None if name == _COUNT and value == 1 else value
        if self.is_built and name in STRUCTURAL and given != now[name]:
            return False
        return not conflict(now | {name: value})

    def can_override(self, settings: Mapping[str, Any]) -> bool:
        return not conflict({**self.settings(), **settings})

    # ---- which calls must be refused

    def formats(self, params: Iterable[Array]) -> list[Any]:
        """What the state of these parameters must have in common with that in a file."""
        moments, low_bits = self.oracle.moments, self.oracle.low_bits_dtype
        return [
            (
                x.shape,
                moments if moments == "packed" else storage.moment_dtype(x.dtype, moments),
                low_bits if x.dtype == storage.BFLOAT16 else None,
            )
            for x in params
        ]

    def _found(self, params: Parameters) -> Own | None:
        """What `own` finds, unless the parameters do not fit or averages are swapped in."""
        dtypes, settings = [str(array.dtype) for array in params.arrays], self.settings()
        fits = all(fitting(dtype, settings) == dtype for dtype in dtypes)
        return self.own(params) if fits and not self.is_swapped else None

    def own(self, params: Parameters) -> Own | None:
        """Excluded positions, and settings by position. None if an array is not a parameter."""
        by_identity = {id(array): i for i, array in enumerate(params.arrays)}

        def found(arrays: Iterable[Array]) -> list[int]:
            return [by_identity.get(id(array), -1) for array in arrays]

        excluded, own = self.oracle.excluded, dict(self.oracle.own)
        if self.to_exclude is not None:
            excluded = set(found(self.to_exclude))
        if -1 in excluded:
            return None
        for arrays, settings in self.to_override:
            for i in set(found(arrays)):
                own[i] = {**own.get(i, {}), **settings} if settings else {}
        if -1 in own:
            return None
        return excluded, {i: settings for i, settings in own.items() if settings}

    def refuses_step(self, params: Parameters, structure: str | None = None) -> bool:
        own = self._found(params)
        if own is None or (structure is not None and self.structure not in (None, structure)):
            return True
        # The optimizer's settings may have changed since.
        return not all(map(self.can_override, own[1].values()))

    def clips_by(self, params: Parameters) -> dict[int, Mapping[str, Any]] | None:
        """The own settings by which `get_gradients` clips. None if the call must be refused."""
        own = self.own(params) if self.to_override else (set(), self.oracle.own)
        if own is None:
            return None
        clips: dict[int, Mapping[str, Any]] = {
            i: {name: x for name, x in each.items() if "clip" in name} for i, each in own[1].items()
        }
        return clips if all(map(self.can_override, clips.values())) else None

    def refuses_build(self, params: Parameters) -> bool:
        own = self._found(params)
        return own is None or any(i >= len(params.arrays) for i in (*own[0], *own[1]))

    # ---- accepted calls

    def build(self, params: Parameters) -> None:
        self._begin(params)
        self._accept(params)
        self.structure = None

    def step(
        self, params: Parameters, grads: Sequence[Array | None], structure: str | None = None
    ) -> list[Any]:
        """Take one call and return the gradients as the call leaves them."""
        self._before(params)
        left = self.oracle.step(grads)
        params.expected = self.oracle.params
        self.structure = structure or self.structure
        return left

    def step_rows(
        self, params: Parameters, indices: Array, grad_rows: Array, *, lazy: bool
    ) -> Array:
        self._before(params)
        left = self.oracle.apply_sparse(indices, grad_rows, lazy=lazy)
        params.expected = self.oracle.params
        return left

    @property
    def can_swap(self) -> bool:
        """Whether there are averages, and parameters to swap them with if there are any."""
        is_bound = self.bound is not None or not self.oracle.params
        return self.is_built and self.oracle.use_ema and is_bound

    def swap_ema(self) -> None:
        if self.bound is not None:
            self.oracle.params = self.bound.expected
            self.oracle.swap_ema()
            self.bound.expected = self.oracle.params
        self.is_swapped = not self.is_swapped

    def set_moments(self, count: int, moments: Mapping[str, Sequence[Array]]) -> None:
        """Set m, v and any vhat from arrays in the dtypes of the arithmetic."""
        self.oracle.set_count(count)
        for i in range(len(self.oracle.params)):
            olds = self.oracle._stored(i)
            like = {name: x for name, x in olds.items() if name in ("packed", "m", "v", "vhat")}
            values = {name: arrays[i] for name, arrays in moments.items()}
            self.oracle._replace(i, storage.store(values, like))

    def copied(self, *, is_deep: bool) -> None:
        """Continue as a copy of the optimizer, which is not bound to the parameters."""
        self.bound = None
        if self.to_exclude and is_deep:
            self.to_exclude = [np.zeros(0)]  # copies too, which are no parameters

    def saved(self) -> Model:
        """What a file of this optimizer contains."""
        saved = Model()
        saved.oracle = copy.deepcopy(self.oracle)
        saved.is_built = self.is_built
        if self.to_exclude is not None:
            saved.oracle.excluded = set()
        return saved

    def fits(self, params: Parameters) -> bool:
        """Whether it can be loaded for these parameters."""
        if not all(map(self.can_override, self.oracle.own.values())):
            return False
        known = self.formats(self.oracle.params) if self.is_built else []
        if not known and self.oracle.iterations == self.oracle.accumulated == 0:
            return True
        return known == self.formats(params.arrays) and self._found(params) is not None

    def loaded(self, params: Parameters) -> Model:
        """The optimizer loaded from a file of this one."""
        loaded = self.saved()
        # State without parameters counts as no state.
        loaded.is_built = self.is_built and bool(self.oracle.params)
        if loaded.is_built:
            loaded._accept(params)
        return loaded

    def _before(self, params: Parameters) -> None:
        if not self.is_built:
            self._begin(params)
        self._accept(params)
        self.oracle.params = params.expected

    def _begin(self, params: Parameters) -> None:
        self.oracle.build(params.expected)
        self.is_built = True

    def _accept(self, params: Parameters) -> None:
        own = self.own(params)
        assert own is not None
        self.oracle.excluded = own[0]
        self.oracle.own = {i: dict(each) for i, each in own[1].items()}
        self.oracle.transposed = params.transposed
        self.to_exclude, self.to_override = None, []
        self.bound = params

    # ---- visible state

    def weights(self) -> list[Array]:
        return self.oracle.weights() if self.is_built else []

    def low_bits(self) -> list[Array | None]:
        """The low bits of each parameter, or None."""
        return (self.oracle.low_bits or [None] * len(self.oracle.params)) if self.is_built else []

    def ema(self) -> list[Array]:
        return self.oracle.ema if self.is_built else []

    def waiting(self) -> list[int]:
        """The positions with accumulated gradients."""
        accumulators = self.oracle.accumulators if self.oracle.accumulated else []
        return [i for i, array in enumerate(accumulators) if array is not None]

    def progress(self) -> dict[str, Any]:
        names = ("iterations", "skipped_steps", "accumulated", "dynamic_loss_scale", "good_steps")
        return {name: getattr(self.oracle, name) for name in names}
