# SPDX-License-Identifier: MIT
"""Programs of valid and refused calls of the whole `Adam` interface, compared with the oracle.

After each call, every bit of parameters, moments and averages, every count and every setting must
equal the oracle's. A refused call must change nothing. Parameters, gradients, indices and rows lie
between inaccessible pages. The optimizer's own memory does not. test_fuzz_stateless.py covers
moments as well.
"""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import fusedadam
import fuzz_runs
import numpy as np
import pytest
import storage_oracle as storage
from fusedadam import Adam
from fuzz_faults import FAULTS, ROUTES
from fuzz_model import Model, Parameters
from fuzz_values import (
    BAD_SETTINGS,
    FORMS,
    OWN_SETTINGS,
    SETTINGS,
    TAME,
    WILD,
    TensorSpec,
    cast_gradient,
    fitting,
    gradient_dtype,
    nested,
    numbers,
    options,
    places,
    seeds,
    strided,
    structure,
    tables,
    tensors,
)
from guarded import Guarded, Order, Place
from helpers import Array, assert_all_same_bits, assert_same_bits, halving
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import LARGEST_COUNT

TALLY = fuzz_runs.tally("programs of Adam")

kinds = st.sampled_from(WILD)


def _alike(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]


def _packed(double: Array) -> Array:
    view: Array = double[0, ...]
    return view


def _spread(double: Array) -> Array:
    view: Array = np.moveaxis(double.reshape(*double.shape[1:], 2), -1, 0)[0, ...]
    return view


def _flat(tree: Any) -> list[Any]:
    """The arrays of `nested`, or autograd's boxes of them."""
    if isinstance(tree, dict):
        return [array for child in tree.values() for array in _flat(child)]
    if isinstance(tree, (list, tuple)):
        return [array for child in tree for array in _flat(child)]
    return [tree]


class AdamMachine(RuleBasedStateMachine):
    """One optimizer in one program."""

    adam: Adam
    model: Model
    params: Parameters
    others: Parameters  # same shapes: another model that shares the optimizer
    rng: np.random.Generator

    def __init__(self) -> None:
        super().__init__()
        self._before = fusedadam.active_isa(), fusedadam.get_num_threads()
        self._directory = tempfile.TemporaryDirectory()
        self.folder = Path(self._directory.name)
        self._is_ready = False
        self._grads: list[Guarded] = []
        self._graded: list[Array] = []  # the parameters of these gradients
        self._doubles: list[Guarded] = []  # room for twice as many gradients
        self._saved: Model | None = None  # the contents of the file at `_path`
        self._path = self.folder / "saved"

    def teardown(self) -> None:
        self._directory.cleanup()
        fusedadam.set_isa(self._before[0])
        fusedadam.set_num_threads(self._before[1])

    # ---- helpers of the rules

    def _drawn(self, specs: Sequence[TensorSpec], kind: str = "plain") -> list[Array]:
        return [numbers(self.rng, shape, dtype, self._kind(kind)) for shape, dtype, _ in specs]

    def _kind(self, kind: str) -> str:
        return kind if self.is_wild or kind in TAME else "plain"

    def _parameters(self, specs: Sequence[TensorSpec], kind: str) -> Parameters:
        if not self.is_misfit:
            settings = self.model.settings()
            specs = [(shape, fitting(dtype, settings), place) for shape, dtype, place in specs]
        drawn = self._drawn(specs, kind)
        return Parameters(drawn, [place for _, _, place in specs], self._orders(specs))

    def _orders(self, specs: Sequence[TensorSpec]) -> list[Order]:
        """One in four in Fortran order, but not a single table: sparse steps need C order."""
        return ["F" if len(specs) > 1 and self.rng.random() < 0.25 else "C" for _ in specs]

    def gradients(self) -> list[Array]:
        """New plain gradients, between guard pages until the next call."""
        return self._new_gradients("plain")

    def _new_gradients(self, kind: str) -> list[Array]:
        specs = self.params.specs
        specs = [(shape, gradient_dtype(self.rng, dtype), place) for shape, dtype, place in specs]
        self._graded = self.params.arrays
        self._grads = [
            Guarded(g, place)
            for g, (_, _, place) in zip(self._drawn(specs, kind), specs, strict=True)
        ]
        return [held.array for held in self._grads]

    def _refused(self, call: Callable[[], object], *errors: type[BaseException]) -> None:
        TALLY["refused calls"] += 1
        with np.errstate(all="ignore"), pytest.raises(errors or (ValueError,)):
            call()

    # ---- initialization

    @initialize(
        specs=st.one_of(
            st.lists(tensors, max_size=5), st.tuples(tables).map(list), st.tuples(tables).map(list)
        ),
        chosen=options(),
        is_wild=st.booleans(),
        is_misfit=st.sampled_from([*[False] * 7, True]),
        seed=seeds,
        isa=st.sampled_from(fusedadam.supported_isas()),
        threads=st.integers(1, 4),
    )
    def begin(
        self,
        specs: list[TensorSpec],
        chosen: dict[str, Any],
        is_wild: bool,
        is_misfit: bool,
        seed: int,
        isa: str,
        threads: int,
    ) -> None:
        """Start. Only parameters of a misfit may have dtypes that the settings do not allow."""
        TALLY["programs"] += 1
        self.rng = np.random.default_rng(seed)
        self.is_wild, self.is_misfit = is_wild, is_misfit
        fusedadam.set_isa(isa)
        fusedadam.set_num_threads(threads)
        self.adam = Adam(**chosen)
        self.model = Model(**chosen)
        self.params, self.others = (self._parameters(specs, "plain") for _ in range(2))
        self._is_ready = True

    # ---- steps

    @rule(
        kind=kinds,
        route=st.sampled_from([*ROUTES, "step"]),
        form=st.sampled_from(
            [
                *("new", "new", "again", "strided", "packed", "spread", "a param", "a moment"),
                *("Fortran", "cast"),
            ]
        ),
        place=places,
        frozen=st.one_of(st.just(set()), st.sets(st.integers(0, 4))),
        nesting=st.sampled_from(FORMS),
    )
    def step(
        self, kind: str, route: str, form: str, place: Place, frozen: set[int], nesting: str
    ) -> None:
        if self.model.oracle.zero_grad and form != "Fortran":
            form = "new"
        given, held, is_alias = self._gradients(kind, form, place)
        grads: list[Any] = [None if i in frozen else g for i, g in enumerate(given)]
        arrays = self.params.arrays
        nested_so: str | None = None
        if route == "step":
            nested_so = structure(len(arrays), nesting)

        def call() -> object:
            if route == "step":
                return self.adam.step(nested(arrays, nesting), nested(grads, nesting))
            return ROUTES[route](self.adam, grads, arrays)

        present = [g for g in grads if g is not None]
        is_refused = self.model.refuses_step(self.params, nested_so) or (
            len(present) < len(grads) and (route == "get_updates" or not present)
        )
        if is_refused:
            self._refused(call)
            return
        with np.errstate(all="ignore"):
            as_cast = [
                None if g is None else self._as_read(g, a, form)
                for g, a in zip(grads, arrays, strict=True)
            ]
            before = copy.deepcopy(given)
            left = self.model.step(self.params, as_cast, nested_so)
            TALLY["calls"] += 1
            returned = call()
        if route == "get_updates":
            self._check_updates(returned)
        else:
            assert returned == self.model.oracle.iterations
        if form == "cast":
            assert all(map(np.array_equal, given, before, [True] * len(given)))
        elif not is_alias:
            expected = [b if g is None else g for g, b in zip(left, before, strict=True)]
            assert_all_same_bits(given, expected, "grads after the call")
        for guarded in held:
            guarded.assert_canaries_alive()

    def _gradients(
        self, kind: str, form: str, place: Place
    ) -> tuple[list[Any], list[Guarded], bool]:
        """Gradients of this form, the memory that holds them, and whether a step writes to it."""
        params = self.params.arrays
        if form == "again" and _alike(self._graded, params):
            return [g.array for g in self._grads], self._grads, False
        grads = self._new_gradients(kind)
        if form in ("packed", "spread"):
            # Both start at the same address in each call, but with another layout.
            if not _alike([_packed(held.array) for held in self._doubles], grads):
                self._doubles = [Guarded(np.stack([g, g]), place) for g in grads]
            views = [_packed(held.array) for held in self._doubles]
            if form == "spread":
                views = [_spread(held.array) for held in self._doubles]
            for view, g in zip(views, grads, strict=True):
                view[...] = g
            return views, self._doubles, False
        if form == "strided":
            pairs = [strided(g, place) for g in grads]
            return [view for _, view in pairs], [held for held, _ in pairs], False
        if form == "Fortran":
            turned = [Guarded(g, place, "F") for g in grads]
            return [held.array for held in turned], turned, False
        if form == "cast":
            return [cast_gradient(self.rng, g) for g in grads], [], False
        if form == "a param":
            return list(params), [], True
        if form == "a moment" and self.model.is_built:
            count = len(grads)
            return self.adam.weights[1 : 1 + count], [], True
        return grads, self._grads, False

    @staticmethod
    def _as_read(grad: Any, param: Array, form: str) -> Array:
        """A copy of a gradient, converted to the dtype of the arithmetic if a call must do so.

        Words of packed moments are integers.
        """
        is_cast = form == "cast" or grad.dtype.kind == "i"
        return np.array(grad, storage.compute_dtype(param.dtype) if is_cast else None)

    def _check_updates(self, updates: Any) -> None:
        oracle = self.model.oracle
        expected: list[Array] = [np.array(oracle.iterations)]
        for i, param in enumerate(oracle.params):
            kinds = (oracle.vhat, oracle.packed, oracle.m, oracle.v)
            expected += [*(kind[i] for kind in kinds if kind), param]
        assert_all_same_bits(updates, expected, "updates")
        every = (len(expected) - 1) // len(oracle.params) if oracle.params else 1
        for update, array in zip(updates[every::every], self.params.arrays, strict=True):
            assert update is array

    @rule(kind=st.sampled_from(TAME), nesting=st.sampled_from([None, *FORMS]))
    def step_by_callable(self, kind: str, nesting: str | None) -> None:
        """Through `get_updates`, or through `minimize` with nested parameters."""
        arrays = self.params.arrays
        if not arrays or sum(a.size for a in arrays) > 5_000:
            return
        factors = self._drawn(self.params.specs, kind)
        nested_so = None if nesting is None else structure(len(arrays), nesting)

        def loss(params: Any) -> Any:
            terms = [anp.sum(c * p) for c, p in zip(factors, params, strict=True)]
            return sum(terms[1:], terms[0])

        def call() -> Any:
            if nesting is None:
                return self.adam.get_updates(loss, arrays)
            return self.adam.minimize(lambda p: loss(_flat(p)), nested(arrays, nesting))

        scale = self.model.oracle.current_loss_scale
        with np.errstate(all="ignore"):
            # autograd does not know bfloat16.
            is_known = all(a.dtype.kind == "f" for a in arrays)
            if not is_known or self.model.refuses_step(self.params, nested_so):
                self._refused(call, ValueError, *([] if is_known else [TypeError]))
                return
            plain = [np.asarray(a) for a in arrays]
            grads = autograd.grad(
                lambda params: scale * loss(params) if scale != 1 else loss(params)
            )(plain)
            value = float(loss(plain))
            given = [np.asarray(g, a.dtype) for g, a in zip(grads, arrays, strict=True)]
            self.model.step(self.params, given, nested_so)
            TALLY["calls"] += 1
            returned = call()
            if nesting is None:
                self._check_updates(returned)
            else:
                assert_same_bits(np.array(returned), np.array(value), "loss")

    @rule(
        kind=kinds,
        fractions=st.lists(st.floats(0, 1, exclude_max=True), max_size=40),
        dtype=st.sampled_from(["int32", "int64"]),
        place=places,
        lazy=st.booleans(),
        is_strided=st.booleans(),
    )
    def step_rows(
        self,
        kind: str,
        fractions: list[float],
        dtype: str,
        place: Place,
        lazy: bool,
        is_strided: bool,
    ) -> None:
        if len(self.params.arrays) != 1 or self.params.arrays[0].ndim == 0:
            return
        (table,) = self.params.arrays
        named = [int(f * len(table)) for f in fractions] if len(table) else []
        indices = Guarded(np.array(named, dtype), place)
        drawn = numbers(
            self.rng,
            (len(named), *table.shape[1:]),
            gradient_dtype(self.rng, str(table.dtype)),
            self._kind(kind),
        )
        held = Guarded(drawn, place)
        rows = held.array
        if is_strided and not self.model.oracle.zero_grad:
            held, rows = strided(drawn, place)

        def call() -> int:
            return self.adam.apply_sparse(indices.array, rows, table, lazy=lazy)

        accumulates = (self.model.oracle.gradient_accumulation_steps or 1) > 1
        if accumulates or self.params.transposed or self.model.refuses_step(self.params):
            self._refused(call)
            return
        left = self.model.step_rows(self.params, indices.array.copy(), rows.copy(), lazy=lazy)
        TALLY["calls"] += 1
        assert call() == self.model.oracle.iterations
        assert_same_bits(rows, left, "grad_rows after the call")
        assert_same_bits(indices.array, np.array(named, dtype), "indices")
        held.assert_canaries_alive()
        indices.assert_canaries_alive()

    @rule(kind=kinds, form=st.sampled_from(["new", "Fortran", "cast"]), place=places)
    def get_gradients(self, kind: str, form: str, place: Place) -> None:
        grads, _, _ = self._gradients(kind, form, place)
        oracle = copy.copy(self.model.oracle)
        oracle.transposed = self.params.transposed
        clips = self.model.clips_by(self.params)
        if clips is None:
            self._refused(lambda: self.adam.get_gradients(grads, self.params.arrays))
            return
        oracle.own = {i: dict(each) for i, each in clips.items()}
        with np.errstate(all="ignore"):
            kept = [
                np.array(self._as_read(g, a, form), order="C")
                for g, a in zip(grads, self.params.arrays, strict=True)
            ]
            TALLY["calls"] += 1
            actual = self.adam.get_gradients(grads, self.params.arrays)
        assert_all_same_bits(actual, oracle.gradients(kept), "get_gradients")
        if form != "cast":
            assert_all_same_bits(grads, kept, "grads")
        for held in self._grads:
            held.assert_canaries_alive()

    # ---- state

    @rule()
    def build(self) -> None:
        self._build(self.params)

    def _build(self, params: Parameters) -> bool:
        TALLY["calls"] += 1
        if self.model.refuses_build(params):
            self._refused(lambda: self.adam.build(params.arrays))
            return False
        self.adam.build(params.arrays)
        self.model.build(params)
        return True

    @rule(specs=st.lists(tensors, max_size=4), kind=kinds)
    def build_others(self, specs: list[TensorSpec], kind: str) -> None:
        """Parameters that differ in number, shapes and dtypes."""
        params = self._parameters(specs, kind)
        if self._build(params):
            self.params, self.others = params, self._parameters(specs, kind)

    @rule(
        count=st.one_of(
            st.integers(0, 3_000),
            st.integers(LARGEST_COUNT - 3, LARGEST_COUNT),
            st.integers(0, LARGEST_COUNT),
        ),
        kind=kinds,
        form=st.sampled_from(["as they are", "wide", "placeholders", "Keras 3"]),
    )
    def set_weights(self, count: int, kind: str, form: str) -> None:
        oracle = self.model.oracle
        specs = self.params.specs if self.model.is_built else []
        specs = [(s, str(storage.compute_dtype(np.dtype(d))), p) for s, d, p in specs]
        m = self._drawn(specs, kind)
        v = [np.asarray(np.abs(x)) for x in self._drawn(specs, kind)]
        more = [np.abs(x) for x in self._drawn(specs, kind)] if oracle.vhat else []
        vhat = [np.asarray(np.maximum(x, y)) for x, y in zip(v, more, strict=False)]
        given: list[Any] = [np.array(count), *m, *v, *vhat]
        lr = None
        if form == "wide":
            given = [count, *(x.astype("longdouble") for x in given[1:])]
        elif form == "placeholders" and not oracle.amsgrad:
            given += [np.zeros(1, "float32") for _ in specs]
        elif form == "Keras 3":
            lr = 0.015625 * (count % 5)
            pairs = [x for pair in zip(m, v, strict=True) for x in pair]
            given = [np.array(count), np.float32(lr), *pairs, *vhat]
        if self.model.is_swapped or not self.model.is_built:
            self._refused(lambda: self.adam.set_weights(given))
            return
        TALLY["calls"] += 1
        with np.errstate(all="ignore"):
            try:
                self.adam.set_weights(given)
            except ValueError as error:
                # Only allowed if the list is ambiguous. Then the layout is named.
                if "more than one layout" not in str(error):
                    raise
                layouts = {"Keras 3": "keras-3", "placeholders": "keras-2"}
                self.adam.set_weights(given, layout=layouts.get(form, "fusedadam"))
            moments = {"m": m, "v": v} | ({"vhat": vhat} if oracle.vhat else {})
            self.model.set_moments(count, moments)
        if lr is not None and not callable(oracle.lr):
            oracle.lr = lr

    @rule(kind=kinds)
    def set_master_weights(self, kind: str) -> None:
        """Read the parameters with their low bits, and write others."""
        arrays, model = self.params.arrays, self.model
        given = [numbers(self.rng, a.shape, "float32", self._kind(kind)) for a in arrays]
        low_bits = model.low_bits() or [None] * len(arrays)
        if model.is_swapped or any(a.dtype == np.float64 for a in arrays):
            self._refused(lambda: self.adam.master_weights(arrays), TypeError, ValueError)
            self._refused(
                lambda: self.adam.set_master_weights(arrays, given), TypeError, ValueError
            )
            return
        TALLY["calls"] += 1
        old = list(map(storage.load_weight, self.params.expected, low_bits))
        assert_all_same_bits(self.adam.master_weights(arrays), old, "master weights")
        self.adam.set_master_weights(arrays, given)
        for i, (array, low) in enumerate(zip(arrays, low_bits, strict=True)):
            named = None if low is None else low.dtype
            self.params.expected[i], new = storage.store_weight(given[i], array.dtype, named)
            if low is not None:
                low[...] = new

    @rule(kind=kinds)
    def write_live_moments(self, kind: str) -> None:
        """Users may write to the optimizer's own arrays in `weights` and `ema`."""
        live = [*self.adam.weights[1:], *self.adam.ema]
        mirrors = [*self.model.weights()[1:], *self.model.ema()]
        TALLY["calls"] += 1
        for array, mirror in zip(live, mirrors, strict=True):
            drawn = numbers(self.rng, array.shape, str(array.dtype), self._kind(kind))
            array[...] = drawn
            mirror[...] = drawn

    @rule(which=st.sampled_from(["copy", "deepcopy", "pickle"]), goes_on=st.booleans())
    def copy(self, which: str, goes_on: bool) -> None:
        copiers: dict[str, Callable[[Adam], Adam]] = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda adam: pickle.loads(pickle.dumps(adam)),
        }
        copier = copiers[which]
        if self.model.is_swapped:
            self._refused(lambda: copier(self.adam))
            return
        if which == "pickle" and self._has_unnamed_schedule():
            self._refused(lambda: copier(self.adam), pickle.PicklingError, AttributeError)
            return
        TALLY["calls"] += 1
        twin = copier(self.adam)
        assert_all_same_bits(twin.get_weights(), self.model.exported(), "weights of the copy")
        assert twin._state.progress.as_dict() == self.model.progress()
        if goes_on and not self.model.to_override:
            self.adam = twin
            self.model.copied(is_deep=which != "copy")

    @rule()
    def save(self) -> None:
        if (
            self.model.is_swapped
            or self.model.to_exclude
            or any(a for a, _ in self.model.to_override)
        ):
            self._refused(lambda: self.adam.save(self._path))
            return
        TALLY["calls"] += 1
        self.adam.save(self._path)
        self._saved = self.model.saved()

    @rule(in_place=st.booleans(), goes_on=st.booleans())
    def load(self, in_place: bool, goes_on: bool) -> None:
        saved = self._saved
        if saved is None:
            return
        lr = saved.oracle.lr
        load = self.adam.load if in_place else Adam.load

        def call() -> Adam:
            return load(self._path, self.params.arrays, lr=lr if callable(lr) else None)

        if (in_place and self.model.is_swapped) or not saved.fits(self.params):
            self._refused(call)
            return
        TALLY["calls"] += 1
        loaded = call()
        assert (loaded is self.adam) == in_place
        model = saved.loaded(self.params)
        assert loaded._state.progress.as_dict() == model.progress()
        assert_all_same_bits(loaded.weights, model.weights(), "weights of a file")
        if in_place or goes_on:
            self.adam, self.model = loaded, model

    @rule()
    def config_round_trip(self) -> None:
        TALLY["calls"] += 1
        if self._has_unnamed_schedule():
            self._refused(self.adam.get_config)
            return
        config = json.loads(json.dumps(self.adam.get_config()))
        again = Adam.from_config(config)
        assert again.get_config() == self.adam.get_config()
        assert (again.weights, again.iterations) == ([], 0)

    def _has_unnamed_schedule(self) -> bool:
        lr = self.model.oracle.lr
        return callable(lr) and lr is not halving

    @rule()
    def swap_ema(self) -> None:
        if not self.model.can_swap:
            self._refused(self.adam.swap_ema)
            return
        TALLY["calls"] += 1
        self.adam.swap_ema()
        self.model.swap_ema()

    @rule(chosen=st.sets(st.integers(0, 4)), is_alien=st.sampled_from([False, False, False, True]))
    def exclude(self, chosen: set[int], is_alien: bool) -> None:
        TALLY["calls"] += 1
        named = [a for i, a in enumerate(self.params.arrays) if i in chosen]
        if is_alien:
            named.append(np.ones(3))
        self.adam.exclude_from_weight_decay(named)
        self.model.to_exclude = named

    @rule(
        chosen=st.sets(st.integers(0, 4)),
        every=st.lists(st.one_of(st.just({}), OWN_SETTINGS, OWN_SETTINGS), min_size=1, max_size=3),
        nesting=st.sampled_from(FORMS),
        builds=st.booleans(),
    )
    def override(
        self, chosen: set[int], every: list[dict[str, Any]], nesting: str, builds: bool
    ) -> None:
        """Several calls in a row. A step or `build` looks the arrays up later."""
        named = [a for i, a in enumerate(self.params.arrays) if i not in chosen]
        for own in every:
            self._override(named, own, nesting)
        if builds:
            self._build(self.params)

    def _override(self, named: list[Array], own: dict[str, Any], nesting: str) -> None:
        if not self.model.can_override(own):
            self._refused(lambda: self.adam.override(nested(named, nesting), **own))
            return
        TALLY["calls"] += 1
        self.adam.override(nested(named, nesting), **own)
        self.model.to_override.append((named, own))

    # ---- settings

    @rule(data=st.data(), name=st.sampled_from(list(SETTINGS)))
    def set(self, data: st.DataObject, name: str) -> None:
        value = data.draw(SETTINGS[name])
        if not self.model.can_set(name, value):
            self._refused(lambda: setattr(self.adam, name, value))
            return
        TALLY["calls"] += 1
        setattr(self.adam, name, value)
        self.model.configure(name, value)

    @rule(bad=st.sampled_from(BAD_SETTINGS))
    def set_to_bad_value(self, bad: tuple[str, Any]) -> None:
        name, value = bad
        self._refused(
            lambda: setattr(self.adam, name, value), TypeError, ValueError, AttributeError
        )

    @rule(isa=st.sampled_from(fusedadam.supported_isas()), threads=st.integers(1, 5))
    def set_isa_and_threads(self, isa: str, threads: int) -> None:
        fusedadam.set_isa(isa)
        fusedadam.set_num_threads(threads)
        assert (fusedadam.active_isa(), fusedadam.get_num_threads()) == (isa, threads)

    # ---- parameters

    @rule()
    def use_the_other_parameters(self) -> None:
        self.params, self.others = self.others, self.params

    @rule(place=places)
    def move_parameters(self, place: Place) -> None:
        """The same numbers at other addresses."""
        if self.model.to_override:
            return  # no step would find them any longer
        moved = [x.copy() for x in self.params.expected]
        orders = self._orders(self.params.specs)
        self.params = Parameters(moved, [place] * len(moved), orders)

    @rule(kind=kinds)
    def write_parameters(self, kind: str) -> None:
        self.params.expected = self._drawn(self.params.specs, kind)
        for array, drawn in zip(self.params.arrays, self.params.expected, strict=True):
            array[...] = drawn

    # ---- faults

    @rule(name=st.sampled_from(list(FAULTS)))
    def refused_call(self, name: str) -> None:
        threads, isa = fusedadam.get_num_threads(), fusedadam.active_isa()
        refused = FAULTS[name](self)
        if refused is None:
            return
        errors = refused.errors
        if self.model.refuses_step(self.params):
            errors = (*errors, ValueError)  # whichever of two reasons is found first
        self._refused(refused.call, *errors)
        assert (fusedadam.get_num_threads(), fusedadam.active_isa()) == (threads, isa)
        for held in self._grads:
            held.assert_canaries_alive()

    # ---- after each call

    @invariant()
    def everything_is_as_the_oracle_says(self) -> None:
        if not self._is_ready:
            return
        adam, model = self.adam, self.model
        known = {id(p): p for p in (self.params, self.others, model.bound) if p is not None}
        for params in known.values():
            params.check()
        assert_all_same_bits(adam.weights, model.weights(), "weights")
        assert_all_same_bits(adam.ema, model.ema(), "ema")
        low_bits = model.low_bits()
        live = adam._state.slots.get("low_bits", [None] * len(low_bits))
        for array, low in zip(live, low_bits, strict=True):
            assert (array is None) == (low is None)
            if low is not None:
                assert_same_bits(array, low, "low bits")
        assert adam._state.progress.as_dict() == model.progress()
        assert adam.iterations == model.oracle.iterations
        assert adam._state.own[0] == model.oracle.excluded
        assert adam._state.own[1] == model.oracle.own
        if model.is_built:
            assert adam._state.is_built
            assert adam._state.steps == model.oracle.steps
            if model.oracle.accumulated:
                assert adam._state.waiting == model.waiting()
        assert adam.current_loss_scale == model.oracle.current_loss_scale
        assert adam._plain_config() | {"lr": adam.lr} == model.config()


def test_programs_of_calls_equal_oracle() -> None:
    fuzz_runs.run_programs(AdamMachine, 50)
    assert TALLY["refused calls"] > 0 < TALLY["calls"]
