# SPDX-License-Identifier: MIT
"""Programs of valid and refused calls of the whole `Adam` interface, compared with the oracle.

After each call, every bit of parameters, moments and averages, every count and every setting must
equal the oracle's. A refused call must change nothing. Parameters, gradients, indices and rows lie
between inaccessible pages. The optimizer's own memory does not. test_fuzz_stateless.py covers
moments as well.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import fusedadam
import fuzz_runs
import fuzz_values as fuzz
import numpy as np
import storage_oracle as storage
from faults import FAULTS, OWN_STEPS, ROUTES, DoesNotApplyError, Program
from fusedadam import Adam
from fuzz_model import SETTINGS, Model, Parameters
from guarded import PLACES, Guarded, Order, Place
from helpers import Array, assert_all_same_bits, assert_same_bits, halving
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from oracle import LARGEST_COUNT

COPIERS: dict[str, Callable[[Adam], Adam]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda adam: pickle.loads(pickle.dumps(adam)),
}
KINDS_OF_FAULTS = sorted({name.split(":")[0] for name in FAULTS})
GRADIENTS = (
    *("new", "new", "again", "strided", "packed", "spread", "a param", "a moment"),
    *("Fortran", "cast"),
)
own_settings = st.lists(st.just({}) | fuzz.OWN_SETTINGS | fuzz.OWN_SETTINGS, min_size=1, max_size=3)
one_table = st.tuples(fuzz.tables).map(list)


def _alike(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]


def _half(double: Array, form: str) -> Array:
    """Half of the numbers: the first ones ("packed"), or every second one ("spread")."""
    if form == "spread":
        double = np.moveaxis(double.reshape(*double.shape[1:], 2), -1, 0)
    view: Array = double[0, ...]
    return view


def _flat(tree: Any) -> list[Any]:
    """The arrays of `nested`, or autograd's boxes of them."""
    if isinstance(tree, dict):
        return [array for child in tree.values() for array in _flat(child)]
    if isinstance(tree, (list, tuple)):
        return [array for child in tree for array in _flat(child)]
    return [tree]


def _as_read(grad: Any, param: Array, form: str) -> Array:
    """A copy of a gradient, converted to the dtype of the arithmetic if a call must do so.

    Words of packed moments are integers.
    """
    is_cast = form == "cast" or grad.dtype.kind == "i"
    return np.array(grad, storage.compute_dtype(param.dtype) if is_cast else None)


class AdamMachine(fuzz_runs.Machine):
    """One optimizer in one program."""

    tally = fuzz_runs.tally("programs of Adam")
    adam: Adam
    model: Model
    params: Parameters
    others: Parameters  # same shapes: another model that shares the optimizer

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self._folder = Path(self._directory.name)
        self._is_ready = False
        self._grads: list[Guarded] = []
        self._graded: list[Array] = []  # the parameters of these gradients
        self._doubles: list[Guarded] = []  # room for twice as many gradients
        self._saved: Model | None = None  # the contents of the file at `_path`
        self._path = self._folder / "saved"

    def teardown(self) -> None:
        super().teardown()
        self._directory.cleanup()

    # ---- helpers of the rules

    def _drawn(self, specs: Sequence[fuzz.TensorSpec], kind: str) -> list[Array]:
        return [self.numbers(shape, dtype, kind) for shape, dtype, _ in specs]

    def _parameters(self, specs: Sequence[fuzz.TensorSpec], kind: str) -> Parameters:
        if not self.is_misfit:
            settings = self.model.settings()
            specs = [(shape, fuzz.fitting(dtype, settings), place) for shape, dtype, place in specs]
        return Parameters(self._drawn(specs, kind), [p for _, _, p in specs], self._orders(specs))

    def _orders(self, specs: Sequence[fuzz.TensorSpec]) -> list[Order]:
        """One in four in Fortran order, but not a single table: sparse steps need C order."""
        return ["F" if len(specs) > 1 and self.rng.random() < 0.25 else "C" for _ in specs]

    def _new_gradients(self, kind: str) -> list[Array]:
        """New gradients, between guard pages until the next call."""
        specs = [(s, fuzz.gradient_dtype(self.rng, dtype), p) for s, dtype, p in self.params.specs]
        self._graded = self.params.arrays
        pairs = zip(self._drawn(specs, kind), specs, strict=True)
        self._grads = [Guarded(g, place) for g, (_, _, place) in pairs]
        return [held.array for held in self._grads]

    @initialize(
        specs=st.lists(fuzz.tensors, max_size=5) | one_table | one_table,
        chosen=fuzz.options(),
        is_misfit=st.sampled_from([*[False] * 7, True]),
        process=fuzz.processes,
    )
    def begin(
        self,
        specs: list[fuzz.TensorSpec],
        chosen: dict[str, Any],
        is_misfit: bool,
        process: dict[str, Any],
    ) -> None:
        """Start. Only parameters of a misfit may have dtypes that the settings do not allow."""
        self.start(process)
        self.is_misfit = is_misfit
        self.adam = Adam(**chosen)
        self.model = Model(**chosen)
        self.params, self.others = (self._parameters(specs, "plain") for _ in range(2))
        self._is_ready = True

    # ---- steps

    @rule()
    def step(self) -> None:
        kind, route, form = self.one(fuzz.WILD), self.one(OWN_STEPS), self.one(GRADIENTS)
        place, nesting = self.one(PLACES), self.one(fuzz.FORMS)
        frozen = self.one((set(), self.some(5)))
        if self.model.oracle.zero_grad and form != "Fortran":
            form = "new"
        given, held, is_alias = self._gradients(kind, form, place)
        grads: list[Any] = [None if i in frozen else g for i, g in enumerate(given)]
        arrays = self.params.arrays
        nested_so = fuzz.structure(len(arrays), nesting) if route == "step" else None

        def call() -> object:
            if route == "step":
                return self.adam.step(fuzz.nested(arrays, nesting), fuzz.nested(grads, nesting))
            return ROUTES[route](self.adam, arrays, grads)

        present = [g for g in grads if g is not None]
        is_refused = self.model.refuses_step(self.params, nested_so) or (
            len(present) < len(grads) and (route == "get_updates" or not present)
        )
        if self.refuses(is_refused, call):
            return
        with np.errstate(all="ignore"):
            as_cast = [
                None if g is None else _as_read(g, a, form)
                for g, a in zip(grads, arrays, strict=True)
            ]
            before = copy.deepcopy(given)
            left = self.model.step(self.params, as_cast, nested_so)
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
            if not _alike([_half(held.array, "packed") for held in self._doubles], grads):
                self._doubles = [Guarded(np.stack([g, g]), place) for g in grads]
            views = [_half(held.array, form) for held in self._doubles]
            for view, g in zip(views, grads, strict=True):
                view[...] = g
            return views, self._doubles, False
        if form == "strided":
            pairs = [fuzz.strided(g, place) for g in grads]
            return [view for _, view in pairs], [held for held, _ in pairs], False
        if form == "Fortran":
            turned = [Guarded(g, place, "F") for g in grads]
            return [held.array for held in turned], turned, False
        if form == "cast":
            return [fuzz.cast_gradient(self.rng, g) for g in grads], [], False
        if form == "a param":
            return list(params), [], True
        if form == "a moment" and self.model.is_built:
            return self.adam.weights[1 : 1 + len(grads)], [], True
        return grads, self._grads, False

    def _check_updates(self, updates: Any) -> None:
        oracle = self.model.oracle
        expected: list[Array] = [np.array(oracle.iterations)]
        for i, param in enumerate(oracle.params):
            state = (oracle.vhat, oracle.packed, oracle.m, oracle.v)
            expected += [*(kind[i] for kind in state if kind), param]
        assert_all_same_bits(updates, expected, "updates")
        every = (len(expected) - 1) // len(oracle.params) if oracle.params else 1
        for update, array in zip(updates[every::every], self.params.arrays, strict=True):
            assert update is array

    @rule()
    def step_by_callable(self) -> None:
        """Through `get_updates`, or through `minimize` with nested parameters."""
        nesting = self.one([None, *fuzz.FORMS])
        arrays = self.params.arrays
        if not arrays or sum(a.size for a in arrays) > 5_000:
            return
        factors = self._drawn(self.params.specs, self.one(fuzz.TAME))
        nested_so = None if nesting is None else fuzz.structure(len(arrays), nesting)

        def loss(params: Any) -> Any:
            terms = [anp.sum(c * p) for c, p in zip(factors, params, strict=True)]
            return sum(terms[1:], terms[0])

        def call() -> Any:
            if nesting is None:
                return self.adam.get_updates(loss, arrays)
            return self.adam.minimize(lambda p: loss(_flat(p)), fuzz.nested(arrays, nesting))

        scale = self.model.oracle.current_loss_scale
        # autograd does not know bfloat16.
        is_known = all(a.dtype.kind == "f" for a in arrays)
        is_refused = not is_known or self.model.refuses_step(self.params, nested_so)
        if self.refuses(is_refused, call, ValueError, *([] if is_known else [TypeError])):
            return
        with np.errstate(all="ignore"):
            plain = [np.asarray(a) for a in arrays]
            grads = autograd.grad(lambda p: scale * loss(p) if scale != 1 else loss(p))(plain)
            value = float(loss(plain))
            given = [np.asarray(g, a.dtype) for g, a in zip(grads, arrays, strict=True)]
            self.model.step(self.params, given, nested_so)
            returned = call()
        if nesting is None:
            self._check_updates(returned)
        else:
            assert_same_bits(np.array(returned), np.array(value), "loss")

    @rule()
    def step_rows(self) -> None:
        if len(self.params.arrays) != 1 or self.params.arrays[0].ndim == 0:
            return
        (table,), oracle = self.params.arrays, self.model.oracle
        lazy, place = self.one((False, True)), self.one(PLACES)
        count = self.one((0, 1, 5, 40)) if len(table) else 0
        named = self.rng.integers(0, max(1, len(table)), count, self.one(("int32", "int64")))
        indices = Guarded(named, place)
        row_dtype = fuzz.gradient_dtype(self.rng, str(table.dtype))
        drawn = self.numbers((count, *table.shape[1:]), row_dtype, self.one(fuzz.WILD))
        held = Guarded(drawn, place)
        rows = held.array
        if self.one((False, True)) and not oracle.zero_grad:
            held, rows = fuzz.strided(drawn, place)

        def call() -> int:
            return self.adam.apply_sparse(indices.array, rows, table, lazy=lazy)

        accumulates = (oracle.gradient_accumulation_steps or 1) > 1
        is_refused = accumulates or self.params.transposed or self.model.refuses_step(self.params)
        if self.refuses(is_refused, call):
            return
        left = self.model.step_rows(self.params, indices.array.copy(), rows.copy(), lazy=lazy)
        assert call() == oracle.iterations
        assert_same_bits(rows, left, "grad_rows after the call")
        np.testing.assert_array_equal(indices.array, named)
        held.assert_canaries_alive()
        indices.assert_canaries_alive()

    @rule()
    def get_gradients(self) -> None:
        form = self.one(("new", "Fortran", "cast"))
        grads, _, _ = self._gradients(self.one(fuzz.WILD), form, self.one(PLACES))
        arrays, clips = self.params.arrays, self.model.clips_by(self.params)
        if self.refuses(clips is None, lambda: self.adam.get_gradients(grads, arrays)):
            return
        oracle = copy.copy(self.model.oracle)
        oracle.transposed = self.params.transposed
        oracle.own = {i: dict(each) for i, each in (clips or {}).items()}
        with np.errstate(all="ignore"):
            kept = [
                np.array(_as_read(g, a, form), order="C")
                for g, a in zip(grads, arrays, strict=True)
            ]
            actual = self.adam.get_gradients(grads, arrays)
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
        if self.refuses(self.model.refuses_build(params), lambda: self.adam.build(params.arrays)):
            return False
        self.adam.build(params.arrays)
        self.model.build(params)
        return True

    @rule(specs=st.lists(fuzz.tensors, max_size=4))
    def build_others(self, specs: list[fuzz.TensorSpec]) -> None:
        """Parameters that differ in number, shapes and dtypes."""
        params, others = (self._parameters(specs, self.one(fuzz.WILD)) for _ in range(2))
        if self._build(params):
            self.params, self.others = params, others

    @rule()
    def set_weights(self) -> None:
        kind, form = self.one(fuzz.WILD), self.one(("plain", "wide", "placeholders", "Keras 3"))
        least, most = self.one(((0, 3_000), (LARGEST_COUNT - 3, LARGEST_COUNT), (0, LARGEST_COUNT)))
        count = int(self.rng.integers(least, most, endpoint=True))
        oracle = self.model.oracle
        specs = self.params.specs if self.model.is_built else []
        specs = [(s, str(storage.compute_dtype(np.dtype(d))), p) for s, d, p in specs]
        m = self._drawn(specs, kind)
        v, more = ([np.asarray(np.abs(x)) for x in self._drawn(specs, kind)] for _ in range(2))
        vhat = [np.asarray(np.maximum(x, y)) for x, y in zip(v, more, strict=True) if oracle.vhat]
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
        is_refused = self.model.is_swapped or not self.model.is_built
        if self.refuses(is_refused, lambda: self.adam.set_weights(given)):
            return
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

    @rule()
    def set_master_weights(self) -> None:
        """Read the parameters with their low bits, and write others."""
        kind = self.one(fuzz.WILD)
        adam, arrays = self.adam, self.params.arrays
        given = [self.numbers(a.shape, "float32", kind) for a in arrays]
        low_bits = self.model.low_bits() or [None] * len(arrays)
        is_refused = self.model.is_swapped or any(a.dtype == np.float64 for a in arrays)
        if self.refuses(is_refused, lambda: adam.master_weights(arrays), TypeError, ValueError):
            self.refuses(
                True, lambda: adam.set_master_weights(arrays, given), TypeError, ValueError
            )
            return
        old = list(map(storage.load_weight, self.params.expected, low_bits))
        assert_all_same_bits(adam.master_weights(arrays), old, "master weights")
        adam.set_master_weights(arrays, given)
        for i, (array, low) in enumerate(zip(arrays, low_bits, strict=True)):
            named = None if low is None else low.dtype
            self.params.expected[i], new = storage.store_weight(given[i], array.dtype, named)
            if low is not None:
                low[...] = new

    @rule()
    def write_live_moments(self) -> None:
        """Users may write to the optimizer's own arrays in `weights` and `ema`."""
        kind = self.one(fuzz.WILD)
        self.tally["calls"] += 1
        live = [*self.adam.weights[1:], *self.adam.ema]
        mirrors = [*self.model.weights()[1:], *self.model.ema()]
        for array, mirror in zip(live, mirrors, strict=True):
            array[...] = mirror[...] = self.numbers(array.shape, array.dtype, kind)

    @rule()
    def copy(self) -> None:
        which = self.one(list(COPIERS))
        copier = COPIERS[which]
        if self.model.is_swapped:
            self.refuses(True, lambda: copier(self.adam))
            return
        lr = self.model.oracle.lr
        is_refused = which == "pickle" and callable(lr) and lr is not halving
        errors = (pickle.PicklingError, AttributeError)
        if self.refuses(is_refused, lambda: copier(self.adam), *errors):
            return
        twin = copier(self.adam)
        assert_all_same_bits(twin.weights, self.model.weights(), "weights of the copy")
        assert twin._state.progress.as_dict() == self.model.progress()
        if not self.model.to_override and self.one((False, True)):
            self.adam = twin
            self.model.copied(is_deep=which != "copy")

    @rule()
    def save(self) -> None:
        model = self.model
        is_refused = model.is_swapped or model.to_exclude or any(a for a, _ in model.to_override)
        if not self.refuses(is_refused, lambda: self.adam.save(self._path)):
            self.adam.save(self._path)
            self._saved = model.saved()

    @rule()
    def load(self) -> None:
        saved, in_place = self._saved, self.one((False, True))
        if saved is None:
            return
        lr = saved.oracle.lr if callable(saved.oracle.lr) else None
        load = self.adam.load if in_place else Adam.load

        def call() -> Adam:
            return load(self._path, self.params.arrays, lr=lr)

        is_refused = (in_place and self.model.is_swapped) or not saved.fits(self.params)
        if self.refuses(is_refused, call):
            return
        loaded = call()
        assert (loaded is self.adam) == in_place
        model = saved.loaded(self.params)
        assert loaded._state.progress.as_dict() == model.progress()
        assert_all_same_bits(loaded.weights, model.weights(), "weights of a file")
        if in_place or self.one((False, True)):
            self.adam, self.model = loaded, model

    @rule()
    def swap_ema(self) -> None:
        if not self.refuses(not self.model.can_swap, self.adam.swap_ema):
            self.adam.swap_ema()
            self.model.swap_ema()

    @rule()
    def exclude(self) -> None:
        self.tally["calls"] += 1
        named = [self.params.arrays[i] for i in self.some(len(self.params.arrays))]
        if self.one((False, False, False, True)):
            named.append(np.ones(3))
        self.adam.exclude_from_weight_decay(named)
        self.model.to_exclude = named

    @rule(every=own_settings)
    def override(self, every: list[dict[str, Any]]) -> None:
        """Several calls in a row. A step or `build` looks the arrays up later."""
        nesting = self.one(fuzz.FORMS)
        named = [self.params.arrays[i] for i in self.some(len(self.params.arrays))]
        for own in every:
            call = partial(self.adam.override, fuzz.nested(named, nesting), **own)
            if not self.refuses(not self.model.can_override(own), call):
                call()
                self.model.to_override.append((named, own))
        if self.one((False, True)):
            self._build(self.params)

    # ---- settings

    @rule(data=st.data(), name=st.sampled_from(list(fuzz.SETTINGS)))
    def set(self, data: st.DataObject, name: str) -> None:
        value = data.draw(fuzz.SETTINGS[name])
        call = partial(setattr, self.adam, name, value)
        if not self.refuses(not self.model.can_set(name, value), call):
            call()
            self.model.configure(name, value)

    @rule()
    def set_isa_and_threads(self) -> None:
        isa, threads = self.one(fusedadam.supported_isas()), self.one((1, 2, 3, 4, 5))
        fusedadam.set_isa(isa)
        fusedadam.set_num_threads(threads)
        assert (fusedadam.active_isa(), fusedadam.get_num_threads()) == (isa, threads)

    # ---- parameters

    @rule()
    def use_the_other_parameters(self) -> None:
        self.params, self.others = self.others, self.params

    @rule()
    def move_parameters(self) -> None:
        """The same numbers at other addresses."""
        if not self.model.to_override:  # or no step would find them any longer
            moved = [x.copy() for x in self.params.expected]
            orders = self._orders(self.params.specs)
            self.params = Parameters(moved, [self.one(PLACES)] * len(moved), orders)

    @rule()
    def write_parameters(self) -> None:
        kind = self.one(fuzz.WILD)
        self.params.expected = self._drawn(self.params.specs, kind)
        for array, drawn in zip(self.params.arrays, self.params.expected, strict=True):
            array[...] = drawn

    # ---- faults

    @rule()
    def refused_calls(self) -> None:
        for _ in range(self.one((1, 5, 20))):
            # First a kind of fault, since some kinds have many rows in the table.
            kind = self.one(KINDS_OF_FAULTS)
            self._refused_call(self.one([x for x in FAULTS if x.startswith(f"{kind}:")]))

    def _refused_call(self, name: str) -> None:
        route = self.one(FAULTS[name].routes)
        grads = self._new_gradients("plain")
        program = Program(self.adam, self.params.arrays, grads, self.rng, self._folder)
        try:
            refused = FAULTS[name].make(program, route)
        except DoesNotApplyError:
            return
        process = fusedadam.get_num_threads(), fusedadam.active_isa()
        kept = [np.asarray(array).tobytes() for array in refused.kept]
        errors = refused.errors if isinstance(refused.errors, tuple) else (refused.errors,)
        # Either of two reasons may be found first, if the step is refused anyway, or if arrays that
        # are yet to be found are not among the parameters of the fault.
        is_doubtful = self.model.refuses_step(self.params, "list") or self.model.to_override
        also = [ValueError] if is_doubtful or self.model.to_exclude else []
        self.refuses(True, refused.call, *errors, *also)
        assert (fusedadam.get_num_threads(), fusedadam.active_isa()) == process
        assert kept == [np.asarray(array).tobytes() for array in refused.kept]
        for held in self._grads:
            held.assert_canaries_alive()

    # ---- after each call

    @invariant()
    def everything_is_as_the_oracle_says(self) -> None:
        if not self._is_ready:
            return
        adam, model, oracle = self.adam, self.model, self.model.oracle
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
        assert adam.iterations == oracle.iterations
        assert adam._state.own == (oracle.excluded, oracle.own)
        if model.is_built:
            assert adam._state.is_built
            assert adam._state.steps == oracle.steps
            if oracle.accumulated:
                assert adam._state.waiting == model.waiting()
        assert adam.current_loss_scale == oracle.current_loss_scale
        assert {name: getattr(adam, name) for name in SETTINGS} == model.settings()


def test_programs_of_calls_equal_oracle() -> None:
    AdamMachine.run(50)
