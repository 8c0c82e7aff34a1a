# SPDX-License-Identifier: MIT
"""Calls that must be refused: how each is made from a valid program, and what its message says.

`FAULTS` is one table for two tests. tests/numpy/test_refusals.py makes each fault once in a small
program and reads the message; tests/fuzz/test_fuzz_adam.py draws faults in programs of any kind.
All else about a call is valid, so a fault that goes unnoticed leads to a step.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import autograd.numpy as anp
import numpy as np
import pytest
import storage_oracle as storage
from bad_settings import BAD_VALUES, HUGE, BadValue, Errors, whole
from fusedadam import Adam, adam_step, set_isa, set_num_threads, supported_isas
from helpers import Array, misaligned, read_only
from oracle import LARGEST_COUNT

EITHER = (TypeError, ValueError)


class CallersError(Exception):
    """Raised by an object of the caller. Its message is not looked at."""


class DoesNotApplyError(Exception):
    """The program cannot have this fault."""


class Refused(NamedTuple):
    call: Callable[[], object]
    errors: Errors
    words: tuple[str, ...] = ()  # patterns that the message contains, in any order
    pattern: str | None = None  # of the whole message, if it does not end in "Received: ..."
    kept: Sequence[Any] = ()  # what the call must not change, besides the program


class Program(NamedTuple):
    """An optimizer at any point of its life, with arguments for a valid step."""

    adam: Adam
    params: list[Array]
    grads: list[Array]
    rng: np.random.Generator
    folder: Path

    @property
    def is_built(self) -> bool:
        return self.adam._state.is_built

    def pick(self, fits: Callable[[Array], object] = np.size) -> int:
        """The position of any parameter that fits."""
        positions = [i for i, param in enumerate(self.params) if fits(param)]
        need(positions)
        return int(self.rng.choice(positions))

    def state(self, kind: str, i: int) -> Any:
        """The live state of this kind of a parameter, or None."""
        return dict(enumerate(self.adam._state.slots.get(kind, []))).get(i)

    def alike(self) -> tuple[int, int]:
        """The positions of two parameters of the same shape and dtype."""
        kinds = [(p.shape, p.dtype) if p.size else i for i, p in enumerate(self.params)]
        pairs = [(i, j) for j, kind in enumerate(kinds) for i in range(j) if kinds[i] == kind]
        need(pairs)
        return pairs[int(self.rng.integers(len(pairs)))]

    def need_bound(self) -> None:
        """The last call stepped these very arrays."""
        bound = self.adam._state.params
        need(len(bound) == len(self.params), all(map(lambda a, b: a is b, bound, self.params)))

    def step(
        self, route: str, errors: Errors, *words: str, params: Any = None, grads: Any = None
    ) -> Refused:
        """A step by this route with other parameters or gradients."""
        params = self.params if params is None else params
        grads = self.grads if grads is None else grads
        if route == "adam_step":
            arguments = {**self.arguments(), "params": params, "grads": grads}
            return self.stateless(arguments, errors, *words)
        call = lambda: ROUTES[route](self.adam, params, grads)
        return Refused(call, errors, words, kept=arrays_in(params, grads))

    def arguments(self) -> dict[str, Any]:
        """Arrays for `adam_step`."""
        dtypes = [storage.compute_dtype(p.dtype) for p in self.params]
        state = {name: list(map(np.ones_like, self.params, dtypes)) for name in STATE}
        return {"params": [*self.params], "grads": [*self.grads], **state}

    def stateless(self, arguments: Mapping[str, Any], errors: Errors, *words: str) -> Refused:
        given = {"step": 3, "zero_grad": self.adam.zero_grad, **arguments}
        return Refused(lambda: adam_step(**given), errors, words, kept=arrays_in(*given.values()))


class Fault(NamedTuple):
    make: Callable[[Program, str], Refused]  # may raise DoesNotApplyError
    routes: Sequence[str]
    programs: Sequence[str]  # in which it is tested
    tested: Sequence[str]  # the routes by which it is tested


FAULTS: dict[str, Fault] = {}


def faults(
    prefix: str,
    rows: Mapping[str, Any],
    routes: Sequence[str] = ("",),
    programs: Sequence[str] = ("built",),
    tested: Sequence[str] = (),
) -> Callable[[Callable[[Program, str, Any], Refused]], Callable[..., Refused]]:
    """Add a fault for each row, made by the decorated function of program, route and row.

    The first row is tested by each route, since each may have its own loop over the arrays.
    """

    def add(make: Callable[[Program, str, Any], Refused]) -> Callable[..., Refused]:
        for i, (name, row) in enumerate(rows.items()):
            FAULTS[f"{prefix}: {name}"] = Fault(
                lambda p, route, row=row: make(p, route, row),  # type: ignore[misc]
                *(routes, programs, (i > 0 and tested) or routes),
            )
        return make

    return add


def arrays_in(*values: Any) -> list[Array]:
    """The arrays among these values and in lists among them."""
    items = [a for x in values for a in (x if isinstance(x, list) else [x])]
    return [a for a in items if isinstance(a, np.ndarray)]


def need(*conditions: object) -> None:
    if not all(conditions):
        raise DoesNotApplyError


def at(name: str, i: object) -> str:
    return rf"\b{name}\[{i}\]"


def while_set(target: object, name: str, value: Any, refused: Refused) -> Refused:
    """The same call while an attribute has this value."""

    def call() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            refused.call()

    return refused._replace(call=call)


def _raising(*_: Any) -> Any:
    raise CallersError


def gives(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def put(items: Sequence[Any], i: int, value: Any) -> list[Any]:
    """A list with another item."""
    return [*items[:i], value, *items[i + 1 :]]


def exchanged(items: Sequence[Any], i: int, j: int) -> list[Any]:
    return put(put(items, i, items[j]), j, items[i])


def views(arrays: Sequence[Array]) -> list[Array]:
    return [a[...] for a in arrays]


ROUTES: dict[str, Callable[[Adam, list[Any], list[Any]], object]] = {
    "apply_gradients": lambda adam, p, g: adam.apply_gradients([*zip(g, p, strict=True)]),
    "an iterator": lambda adam, p, g: adam.apply_gradients(zip(g, p, strict=True)),
    "lists": lambda adam, p, g: adam.apply_gradients([[*x] for x in zip(g, p, strict=True)]),  # type: ignore[misc]
    "get_updates": lambda adam, p, g: adam.get_updates(g, p),
    "step": lambda adam, p, g: adam.step(p, g),
    "get_gradients": lambda adam, p, g: adam.get_gradients(g, p),
    "build": lambda adam, p, _: adam.build(p),
}
OWN_STEPS = ("apply_gradients", "an iterator", "lists", "get_updates", "step")
STEPS = (*OWN_STEPS, "adam_step")
ONE = ("apply_gradients",)
STATE = ("m", "v", "vhat", "ema")
ALSO_FRESH = ("built", "fresh")

# A value, errors, and a pattern of the message.
Wrong: TypeAlias = "tuple[Any, Errors, str]"


def rows(values: Sequence[Any], errors: Errors, *words: str) -> dict[str, Wrong]:
    """Rows for these values, named after them. Huge numbers are cut off."""
    return {f"{value!r:.40}": (value, errors, whole(*words)) for value in values}


# -- one bad array ----------------------------------------------------------------------------


class Bad(NamedTuple):
    make: Callable[[Array], Any]  # from the valid array
    error: Any
    rule: str
    ndim: int = 1
    extent: int = 0  # the least of each axis

    def fits(self, a: Array) -> bool:
        """Whether it spoils this array. An array of one element would fit any layout."""
        return a.size > 1 and a.ndim >= self.ndim and min(a.shape, default=9) >= self.extent

    @np.errstate(all="ignore")
    def of(self, a: Array) -> Any:
        bad = self.make(a)
        need(self.rule != "shape" or np.shape(bad) != a.shape)
        return bad

    def spoil(self, p: Program, arrays: Sequence[Array]) -> tuple[int, list[Any]]:
        """Make one of the arrays bad."""
        i = p.pick(self.fits)
        return i, put(arrays, i, self.of(arrays[i]))


def ones(dtype: Any) -> Callable[[Array], Array]:
    return lambda a: np.ones(a.shape, dtype)


def cast(dtype: str) -> Callable[[Array], Array]:
    return lambda a: a.astype(dtype)


def other_dtype(a: Array) -> Array:
    return a.astype("float32" if a.dtype == np.float64 else "float64")


def strided(a: Array) -> Array:
    view: Array = np.repeat(a, 2).reshape(*a.shape, 2)[..., 0]
    return view


def in_other_order(a: Array) -> Array:
    copied: Array = a.copy("F" if a.flags.c_contiguous else "C")
    return copied


def overlapping(a: Array) -> Array:
    return np.lib.stride_tricks.as_strided(a.copy(), strides=(a.itemsize,) * a.ndim)


FLOATS = "must be float32, float64, float16 or bfloat16"
GAPS = r"fill its memory without gaps or overlaps.*numpy\.ascontiguousarray\("
MASKED = {
    "masked": Bad(np.ma.array, TypeError, r"mask.*\.filled\("),
    "masked in part": Bad(lambda a: np.ma.array(a, mask=np.isnan(a)), TypeError, "mask"),
}
NO_ARRAYS = {
    "a NumPy scalar": Bad(lambda _: np.float32(1), TypeError, "ndarray"),
    "a float": Bad(lambda _: 1.0, TypeError, "ndarray"),
    "None": Bad(lambda _: None, TypeError, "ndarray"),
    "a memoryview": Bad(lambda _: memoryview(b"1234"), TypeError, "ndarray"),
}
# What could be read, but not updated or zeroed in place.
NOT_IN_PLACE = {
    "strided": Bad(strided, ValueError, GAPS),
    **MASKED,
    "a list": Bad(lambda a: a.tolist(), TypeError, "ndarray"),
    **{t: Bad(cast(t), TypeError, FLOATS) for t in ("int16", "longdouble", "bool", "object")},
    "int32": Bad(ones("int32"), TypeError, FLOATS),
    "complex": Bad(cast("complex64"), TypeError, rf"{FLOATS}.*\.view\(numpy\.float32"),
    "a record": Bad(ones([("x", "f4")]), TypeError, FLOATS),
    "swapped bytes": Bad(
        lambda a: a.view(a.dtype.newbyteorder()), TypeError, f"{FLOATS}, in the native byte order"
    ),
    "misaligned": Bad(misaligned, ValueError, "align"),
    "strided in Fortran order": Bad(lambda a: strided(a.T).T, ValueError, GAPS, 2),
    "reversed": Bad(lambda a: a[::-1].copy()[::-1], ValueError, GAPS, 1, 2),
    "reversed in Fortran order": Bad(lambda a: a.T[::-1].copy()[::-1].T, ValueError, GAPS, 2, 2),
    "broadcast": Bad(lambda a: np.broadcast_to(a[0], a.shape), ValueError, GAPS, 1, 2),
    "overlapping": Bad(overlapping, ValueError, GAPS, 2, 2),
    "read-only": Bad(read_only, ValueError, r"writeable.*numpy\.array\("),
}
WRITTEN = {**NOT_IN_PLACE, **NO_ARRAYS}
# What can be written, but not beside the other arrays of a parameter.
UNLIKE = {
    "another dtype": Bad(other_dtype, TypeError, "float(32|64)"),
    "transposed": Bad(lambda a: a.T.copy(), ValueError, "shape", 2),
    "flat": Bad(lambda a: a.ravel().copy(), ValueError, "shape", 2),
    "shorter": Bad(lambda a: a[:-1].copy(), ValueError, "shape"),
    "longer": Bad(lambda a: np.concatenate([a, a[:1]]), ValueError, "shape"),
    "another rank": Bad(lambda a: a[None].copy(), ValueError, "shape"),
}
ORDER = r"order in memory of params.*numpy\.zeros_like"
OTHER_ORDER = {"another order": Bad(in_other_order, ValueError, ORDER, 2, 2)}
# What is no gradient.
SAME_KIND = r"\bfloat(32|64)\b.*same_kind.*\.astype\("
READ = {
    **{name: bad for name, bad in UNLIKE.items() if bad.rule == "shape"},
    **MASKED,
    **{t: Bad(ones(t), TypeError, SAME_KIND) for t in ("complex64", "complex128", "object", "str")},
    **{t: Bad(ones(t), TypeError, SAME_KIND) for t in ("bytes", "timedelta64[s]")},
    "a record": Bad(ones([("x", "f4")]), TypeError, "same_kind"),
    "complex numbers": Bad(lambda a: (np.ones(a.shape) + 1j).tolist(), TypeError, "same_kind"),
    "text": Bad(lambda _: "gradient", TypeError, "array"),
    "text of bytes": Bad(lambda _: b"gradient", TypeError, "array"),
    "no array": Bad(lambda _: object(), TypeError, "array"),
    "ragged lists": Bad(lambda _: [[1.0], [1.0, 2.0]], TypeError, "array"),
    "to be broadcast": Bad(lambda a: a[:1], ValueError, "shape"),
    "a scalar": Bad(lambda _: np.float32(1), ValueError, "shape"),
    "empty": Bad(lambda a: a[:0], ValueError, "shape"),
}


@faults("param", WRITTEN, (*STEPS, "build"), ALSO_FRESH, ("apply_gradients", "build"))
def _bad_param(p: Program, route: str, bad: Bad) -> Refused:
    i, params = bad.spoil(p, p.params)
    return p.step(route, bad.error, at("params", i), bad.rule, params=params)


@faults("param unlike its moments", UNLIKE, OWN_STEPS, tested=("apply_gradients", "get_updates"))
def _unlike_the_moments(p: Program, route: str, bad: Bad) -> Refused:
    need(p.is_built)
    i, params = bad.spoil(p, p.params)
    grads = list(map(np.ones_like, params))
    return p.step(route, ValueError, at("params", i), r"\bbuild\b", params=params, grads=grads)


TO_ZERO = NOT_IN_PLACE | {"another dtype": UNLIKE["another dtype"]}


@faults("grad", READ, (*STEPS, "get_gradients"), tested=("apply_gradients", "adam_step"))
@faults("grad to zero", TO_ZERO, STEPS, ("zeroing",), ("apply_gradients", "adam_step"))
def _bad_grad(p: Program, route: str, bad: Bad) -> Refused:
    is_written = p.adam.zero_grad  # so that the dtype may be wrong as well
    need(is_written or bad in READ.values())
    i, grads = bad.spoil(p, p.grads)
    errors, rule = ((TypeError, bad.error), "") if is_written else (bad.error, bad.rule)
    return p.step(route, errors, at("grads", i), rule, grads=grads)


# From here on, the route can also be the name of an argument of adam_step.
@faults("adam_step", WRITTEN, ("params", *STATE), tested=("m",))
@faults("adam_step, unlike its parameter", UNLIKE | OTHER_ORDER, STATE)
def _bad_state(p: Program, route: str, bad: Bad) -> Refused:
    arguments = p.arguments()
    i, arguments[route] = bad.spoil(p, arguments[route])
    rule = f"({bad.rule}|must be float(32|64) for a parameter)"  # int16 is a dtype of `packed`
    return p.stateless(arguments, bad.error, at(route, i), rule)


ALONE = {name: WRITTEN[name] for name in ("strided", "misaligned", "read-only", "int32")}
NO_GRAD = {"None": Bad(lambda _: None, ValueError, "^An operation has `None` for gradient")}


@faults("adam_step of one array", ALONE, ("params", "m", "v"))
@faults("adam_step of one array", NO_GRAD, ("grads",))
def _one_bad_array(p: Program, route: str, bad: Bad) -> Refused:
    i = p.pick(bad.fits)
    arguments = {name: arrays[i] for name, arrays in p.arguments().items()}
    arguments[route] = bad.make(arguments[route])
    return p.stateless(arguments, bad.error, rf"\b{route}\b", bad.rule)


# -- what is missing, counts and containers -----------------------------------------------------


NUMBERS: dict[str, Callable[[list[Any]], Any]] = {
    "fewer": lambda items: items[:-1],
    "more": lambda items: [*items, np.ones(2)],
    "none": lambda _: [],
}
# A change of the gradients, and words of the message.
Grads: TypeAlias = "tuple[Callable[[list[Any]], Any], str]"
GRADS: dict[str, Grads] = {
    name: (change, r"\bgrads\b.*\bCOUNT\b.*: GIVEN$") for name, change in NUMBERS.items()
}
NO_GRADS: dict[str, Grads] = {
    "all None": (lambda grads: [None for _ in grads], "must not all be None"),
    "nested otherwise": (lambda grads: {"p0": grads[0]}, r"\bgrads\b"),
}
ONE_NONE = r"^An operation has `None` for gradient\. .*: grads\[LAST\]=None$"


@faults("grads", GRADS, ("get_updates", "get_gradients", "adam_step", "step"))
@faults("grads", NO_GRADS, ("step",))
@faults(
    "grads",
    {"one None": (lambda grads: [*grads[:-1], None], ONE_NONE)},
    ("get_updates", "get_gradients", "adam_step"),
    ALSO_FRESH,
)
def _grads(p: Program, route: str, row: Grads) -> Refused:
    need(p.params)
    count, grads, said = len(p.params), row[0](p.grads), row[1]
    for word, number in {"COUNT": count, "GIVEN": len(grads), "LAST": count - 1}.items():
        said = said.replace(word, str(number))
    return p.step(route, TypeError if isinstance(grads, dict) else ValueError, said, grads=grads)


@faults("params", NUMBERS, OWN_STEPS, tested=ONE)
def _another_number_of_params(p: Program, route: str, change: Any) -> Refused:
    need(p.is_built, p.params)
    params = change(p.params)
    words = (r"\bparams\b", r"\bbuild\b", f": {len(params)}$")
    grads = [np.ones(x.shape) for x in params]
    return p.step(route, ValueError, *words, params=params, grads=grads)


class BreakingSequence(Sequence[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, _: Any) -> Any:
        raise CallersError


CONTAINERS: dict[str, tuple[Callable[[list[Any]], Any], Errors]] = {
    "fewer": (NUMBERS["fewer"], ValueError),
    "none": (NUMBERS["none"], ValueError),
    "a number": (lambda _: 1.0, TypeError),
    "text": (lambda _: "arrays", TypeError),
    "bytes": (lambda _: b"arrays", TypeError),
    "what raises": (lambda _: BreakingSequence(), CallersError),
}


@faults("adam_step of lists", {"one array": (lambda x: x[0], TypeError)}, ("grads", *STATE))
@faults("adam_step of lists", CONTAINERS, ("params", "grads", *STATE))
def _no_list(p: Program, route: str, row: tuple[Any, Errors]) -> Refused:
    arguments = p.arguments()
    need(p.params)
    arguments[route] = row[0](arguments[route])
    return p.stateless(arguments, row[1], rf"\b{route}\b")


def _breaking(pairs: list[Any]) -> Iterator[Any]:
    yield pairs[0]
    _raising()


ONE_PAIR = r"grads_and_vars\[1\]"
PAIRS: dict[str, tuple[Callable[[list[Any]], Any], Errors, str]] = {
    "None": (lambda _: None, TypeError, r"grads_and_vars\b"),
    "a number": (lambda _: 3.0, TypeError, r"grads_and_vars\b"),
    "an array": (lambda pairs: [pairs[0], pairs[1][1]], TypeError, ONE_PAIR),
    "too short": (lambda pairs: [pairs[0], pairs[1][:1]], TypeError, ONE_PAIR),
    "too long": (lambda pairs: [pairs[0], (*pairs[1], 0)], TypeError, ONE_PAIR),
    "None inside": (lambda pairs: [pairs[0], None], TypeError, ONE_PAIR),
    "what raises": (_breaking, CallersError, ""),
}


@faults("pairs", PAIRS, programs=ALSO_FRESH)
def _no_pairs(p: Program, _: str, row: tuple[Callable[[list[Any]], Any], Errors, str]) -> Refused:
    need(len(p.params) > 1 and p.params[1].shape[:1] != (2,))  # which would be a pair
    pairs = row[0](list(zip(p.grads, p.params, strict=True)))
    return Refused(lambda: p.adam.apply_gradients(pairs), row[1], (row[2],))


# -- wrong places, and overlaps -----------------------------------------------------------------

# From params, grads and two positions: new ones, and what the message has received.
Places: TypeAlias = "tuple[Callable[..., tuple[list[Any], list[Any]]], str]"
ALSO, WAS = "grads[I], which was the parameter params[I]", "params[I], which was params[J]"
OTHER_PLACE = "grads[I], which was the parameter params[J]"
PLACES: dict[str, Places] = {
    "wrong way round": (lambda p, g, *_: (g, p), ALSO),
    "one the wrong way round": (lambda p, g, i, _: (put(p, i, g[i]), put(g, i, p[i])), ALSO),
    "wrong way round as views": (lambda p, g, *_: (g, views(p)), ALSO),
    "in another order too": (lambda p, g, i, j: (g, exchanged(p, i, j)), OTHER_PLACE),
    "two exchanged": (lambda p, g, i, j: (exchanged(p, i, j), exchanged(g, i, j)), WAS),
    "views exchanged": (lambda p, g, i, j: (exchanged(views(p), i, j), g), WAS),
    "one moved, the others new": (lambda p, g, i, j: (put(copy.deepcopy(p), i, p[j]), g), WAS),
}
SOME = ("apply_gradients", "get_updates", "step")


@faults("places", PLACES, OWN_STEPS, ("alike", "alike, built"), SOME)
@faults("places", {"accumulating": PLACES["wrong way round"]}, OWN_STEPS, ("accumulating",), ONE)
def _misplaced(p: Program, route: str, row: Places) -> Refused:
    p.need_bound()
    filled = [i for i, a in enumerate(p.params) if a.size]  # others may be anywhere
    need(len(filled) > int("J" in row[1]))
    i, j = filled[0], int(p.rng.choice(filled[1:] or filled))
    params, grads = row[0](p.params, p.grads, i, j)
    rule = "order of the steps before" if row[1][0] == "p" else "must not change places"
    received = re.escape(row[1].replace("I", str(i)).replace("J", str(j)))
    refused = p.step(route, ValueError, params=params, grads=grads)
    return refused._replace(pattern=whole(rule, received=received))


@faults("params that overlap", {"": 0}, (*STEPS, "build"), ("alike", "fresh, alike"))
@faults("params that overlap", {"in another layout": 1}, OWN_STEPS, ("alike",), ONE)
def _overlapping_params(p: Program, route: str, in_another_layout: bool) -> Refused:
    i, j = p.alike()
    copied = in_other_order if in_another_layout else copy.copy
    params = [copied(a) for a in p.params]  # not those before, whose order would be wrong
    params[j] = params[i]
    return p.step(route, ValueError, at("params", r"\d"), "overlap", params=params)


# Arrays out of one buffer of twelve float32 numbers.
OVERLAPPING: dict[str, Callable[[Array], list[Array]]] = {
    "one view twice": lambda b: [b[:4], b[:4]],
    "one element shared": lambda b: [b[:4], b[3:7]],
    "in the other order": lambda b: [b[3:7], b[:4]],
    "another shape": lambda b: [b[:4].reshape(2, 2), b[2:6]],
    "another dtype": lambda b: [b[:4], b.view("float64")[1:5]],
    "one inside the other": lambda b: [b[:8], b[2:6]],
    "not neighbours in the list": lambda b: [b[:4], b[8:], b[2:6]],
    "a 0-d inside": lambda b: [b[:4], b[3:4].reshape(())],
}


@faults("arrays that overlap", OVERLAPPING, ("build", "params", "m", "v"), ("fresh",))
def _overlapping_arrays(p: Program, route: str, views: Callable[[Array], list[Array]]) -> Refused:
    arrays = views(np.arange(12, dtype="float32"))
    if route == "build":
        return p.step(route, ValueError, at("params", r"\d"), "overlap", params=arrays)
    ones = {name: list(map(np.ones_like, arrays)) for name in ("params", "grads", "m", "v")}
    return p.stateless({**ones, route: arrays}, ValueError, at(route, r"\d"), "overlap")


@faults("param that is", {"state": 0}, STATE, ("zeroing",))
def _state_as_param(p: Program, route: str, _: Any) -> Refused:
    i = p.pick()
    array = p.state(route, i)
    need(array is not None and array.dtype == p.params[i].dtype)
    params = put(p.params, i, array)
    return p.step("get_updates", ValueError, r"\[\d\].*overlap", params=params)


@faults(
    "grad to zero that is", {"another array": 0}, ("params", "view", "grads", *STATE), ("zeroing",)
)
@faults("grad to zero that is", {"a parameter": 1}, ("params", "grads"), ("zeroing",))
def _shared_grad_to_zero(p: Program, route: str, is_stateless: bool) -> Refused:
    need(p.adam.zero_grad)
    i, j = p.alike() if route == "grads" else (p.pick(),) * 2
    others = {"params": p.params[j], "grads": p.grads[j], "view": p.params[j][...]}
    array = others[route] if route in others else p.state(route, j)
    need(array is not None and array.dtype == p.grads[i].dtype)
    grads = put(p.grads, i, array)
    step = "adam_step" if is_stateless else "apply_gradients"
    return p.step(step, ValueError, at("grads", r"\d"), "overlap", grads=grads)


TWO = {f"{a} and {b}": (a, b) for i, b in enumerate(STATE) for a in ("params", *STATE[:i])}


@faults("adam_step that overlaps", TWO, ("lists", "arrays"))
def _overlapping_arguments(p: Program, route: str, row: tuple[str, str]) -> Refused:
    i, arguments, (one, other) = p.pick(), p.arguments(), row
    need(arguments[one][i].dtype == arguments[other][i].dtype)
    arguments[one][i] = arguments[other][i]
    if route == "arrays":
        arguments = {name: arrays[i] for name, arrays in arguments.items()}
    return p.stateless(arguments, ValueError, rf"\b({one}|{other})\b.*overlap")


@faults("read-only since", {"": 0}, (*OWN_STEPS, "swap_ema"), ("zeroing",))
def _read_only_since(p: Program, route: str, _: Any) -> Refused:
    i, refused = p.pick(), Refused(p.adam.swap_ema, ValueError, ("params", "writeable"))
    if route == "swap_ema":
        p.need_bound()
        need(p.adam.use_ema)
    else:
        refused = p.step(route, ValueError, at("params", i), "writeable")
    return while_set(p.params[i].flags, "writeable", False, refused)


# -- losses and schedules -----------------------------------------------------------------------

LOSSES: dict[str, Wrong] = {
    "raises": (_raising, CallersError, ""),
    "is no scalar": (lambda p: anp.ones(2) * anp.sum(p[0]), TypeError, ".*scalar.*"),
    "is of nothing": (lambda p: anp.sum(p[99]), IndexError, ".*out of range"),
    **rows(
        (0.25, np.float32(0.25), None, "loss", b"loss", {"loss": 1}, {1.0}, 3),
        *(TypeError, r"\bloss\b", "callable", r"torch\.Tensor", "sequence"),
    ),
}


@faults("loss", LOSSES, ("get_updates", "get_gradients"), ALSO_FRESH)
def _loss(p: Program, route: str, row: Wrong) -> Refused:
    # autograd does not know bfloat16.
    need(p.params and p.params[0].size, all(a.dtype.kind == "f" for a in p.params))
    return Refused(lambda: getattr(p.adam, route)(row[0], p.params), row[1], pattern=row[2])


SCHEDULES: dict[str, Wrong] = {
    "raises": (_raising, CallersError, ""),
    **rows((-1.0, math.nan, math.inf, np.float32("nan")), ValueError, r"\blr\b"),
    **rows(("fast", None, [0.5], 1j, True, np.True_), TypeError, r"\blr\b"),
}


@faults("schedule", SCHEDULES, OWN_STEPS, ALSO_FRESH, ONE)
def _schedule(p: Program, route: str, row: Wrong) -> Refused:
    schedule = row[0] if callable(row[0]) else gives(row[0])
    return while_set(p.adam, "lr", schedule, p.step(route, row[1])._replace(pattern=row[2]))


# -- lists of weights ---------------------------------------------------------------------------

LENGTH = (
    r"Length of the specified weight list \(\d+\) does not match "
    r"the number of weights of the optimizer \(\d+\).*"
)
SHAPE = r"Optimizer weight shape \(.*\) not compatible with provided weight shape \(.*\).*"


def _item(i: int, change: Callable[[Array], Any]) -> Callable[[list[Array]], list[Any]]:
    """A change of one item. All values differ from the old ones, so a partial copy is visible."""

    def changed(weights: list[Array]) -> list[Any]:
        others = [np.where(w == LARGEST_COUNT, w, w + 1) for w in weights]
        return put(others, i % len(weights), change(weights[i]))

    return changed


def _transposed(weight: Array) -> Array:
    need(weight.shape != weight.shape[::-1])
    return np.transpose(weight)


FIRST, OTHER = r"weights\[0\]", r"weights\[1\]"
WEIGHTS: dict[str, tuple[Callable[[list[Array]], Any], Errors, str]] = {
    "too few": (lambda w: w[:-1], ValueError, LENGTH),
    "too many": (lambda w: [*w, *w, *w], ValueError, LENGTH),
    "none": (lambda _: [], ValueError, LENGTH),
    "only iterations": (lambda w: w[:1], ValueError, LENGTH),
    "another shape": (_item(-1, lambda w: w[None]), ValueError, SHAPE),
    "transposed": (_item(2, _transposed), ValueError, SHAPE),
    "iterations of another shape": (_item(0, lambda _: np.array([5])), ValueError, SHAPE),
    "-1 steps": (_item(0, lambda _: -1), ValueError, rf"{FIRST}.*(>= 0|negative|from 0)"),
    "half a step": (_item(0, lambda _: 1.5), EITHER, FIRST),
    "NaN steps": (_item(0, lambda _: math.nan), EITHER, FIRST),
    "2**53 + 1 steps": (_item(0, lambda _: 2**53 + 1), EITHER, FIRST),
    "2**63 steps": (_item(0, lambda _: np.array(2**63, "uint64")), EITHER, FIRST),
    "complex": (_item(1, lambda w: w + 1j), EITHER, OTHER),
    "text": (_item(1, lambda w: np.full(w.shape, "x")), EITHER, OTHER),
    "masked": (_item(1, np.ma.array), TypeError, rf"{OTHER}.*mask"),
    "None": (_item(1, lambda _: None), EITHER, OTHER),
    "no list": (lambda _: 7, TypeError, r"\bweights\b"),
    "no list but None": (lambda _: None, TypeError, r"\bweights\b"),
}


@faults("weights", WEIGHTS)
def _weights(p: Program, _: str, row: tuple[Any, Errors, str]) -> Refused:
    need(p.is_built, p.params)
    new = row[0](p.adam.get_weights())
    said = row[2] if row[2] in (LENGTH, SHAPE) else whole(row[2])
    return Refused(lambda: p.adam.set_weights(new), row[1], pattern=said)


@faults("weights", {"overflow as an error": 0})
def _overflow_as_error(p: Program, _: str, __: Any) -> Refused:
    """Values too large for float32 in the last moment, while the caller makes overflow an error."""
    need(p.is_built, p.params)
    weights = p.adam.get_weights()
    need(weights[-1].dtype == np.float32, weights[-1].size)
    changed = _item(-1, lambda w: np.full(w.shape, 1e300))(weights)
    raising = np.errstate(all="ignore", over="raise")(p.adam.set_weights)
    return Refused(lambda: raising(changed), FloatingPointError, pattern=".*overflow.*")


# -- rows of a table ----------------------------------------------------------------------------


def moved(i: int, by: int, dtype: str = "int64") -> Callable[[Array], Array]:
    def change(indices: Array) -> Array:
        indices[i] += by
        return indices.astype(dtype)

    return change


def turned(table: Array) -> Array:
    need(table.ndim > 1 and min(table.shape) > 1)
    return np.asfortranarray(table)


I, R, T = r"\bindices\b", r"\bgrad_rows\b", r"\bparam\b"
INDEX_DTYPES = ("float64", "int16", "uint64", "uint32", "bool", "object", ">i8", "complex64")
NO_INDICES = (None, "012", 1, [0, 1.0], [0, True], [0, None], [0, [1]], [0, "1"])
# An argument, its change, errors and words. The indices are those of the first, last and first row.
Row: TypeAlias = "tuple[str, Callable[[Any], Any], Errors, str]"


def bad(argument: str, table: Mapping[str, Bad], *names: str) -> dict[str, Row]:
    return {
        name: (argument, table[name].make, table[name].error, table[name].rule) for name in names
    }


INDICES: dict[str, Row] = {
    "too large": (I, moved(1, 1), ValueError, r"indices\[1\].*: \d+$"),
    "int32": (I, moved(1, 1, "int32"), ValueError, r"indices\[1\].*: \d+$"),
    "far too large": (I, moved(0, 2**62), ValueError, rf"indices\[0\].*: {2**62}$"),
    "negative": (I, moved(2, -1), ValueError, r"indices\[2\].*: -1$"),
    "least": (I, moved(2, -(2**63)), ValueError, r"indices\[2\]"),
    "masked": (I, np.ma.array, TypeError, "mask"),
    "2-d": (I, lambda i: i[:, None], ValueError, "one dimension"),
    "0-d": (I, lambda i: i[0, ...], ValueError, "one dimension"),
    "one fewer": (I, lambda i: i[:2], ValueError, "grad_rows must have the shape of"),
    "none": (I, lambda i: i[:0], ValueError, "grad_rows must have the shape of"),
    **{t: (I, moved(0, 0, t), TypeError, "int32 or int64") for t in INDEX_DTYPES},
    **{repr(x): (I, gives(x), TypeError, I) for x in NO_INDICES},
}
GRAD_ROWS: dict[str, Row] = {
    "one fewer": (R, lambda r: r[:2], ValueError, "must have the shape of"),
    "longer": (R, lambda r: np.repeat(r[..., None], 2, -1), ValueError, "must have the shape of"),
    "only one": (R, lambda r: np.asarray(r[0]), ValueError, "must have the shape of"),
    **bad(R, READ, "complex64", "object", "str", "masked", "text"),
    "None": (R, lambda _: None, EITHER, R),
}
IN_PLACE = ("masked", "a list", "None", "misaligned", "strided", "read-only", "int32")
TABLES: dict[str, Row] = {
    "Fortran": (T, turned, ValueError, "must be C-contiguous.*ascontiguous"),
    "0-d": (T, lambda _: np.ones((), "float32"), ValueError, "at least one dimension"),
    "longer": (T, lambda t: np.concatenate([t, t]), ValueError, r"\bbuild\b"),
    **bad(T, WRITTEN, *IN_PLACE),
}
MODES = ("lazy", "dense")


def is_table(param: Array) -> bool:
    return param.ndim > 0 and param.size > 0


def accumulates(p: Program) -> bool:
    return (p.adam.gradient_accumulation_steps or 1) > 1


ALSO_ROWS = ("strided", "reversed", "misaligned", "read-only", "a list", "another dtype")
ROWS_TO_ZERO: dict[str, Row] = {name: (R, TO_ZERO[name].make, EITHER, R) for name in ALSO_ROWS}


@faults("indices", INDICES, MODES, ("table", "fresh table"), ("lazy",))
@faults("rows", GRAD_ROWS, MODES, ("table", "fresh table"), ("lazy",))
@faults("rows to zero", ROWS_TO_ZERO, MODES, ("zeroing table",), ("lazy",))
@faults("table", TABLES, MODES, ("table",))
def _rows(p: Program, route: str, row: Row) -> Refused:
    need(len(p.params) == 1 and p.pick(is_table) == 0, not accumulates(p))
    need(row[0] != T or (p.is_built and p.params[0].size > 1))  # one element would fit any layout
    need(p.adam.zero_grad or row not in ROWS_TO_ZERO.values())
    indices = np.array([0, len(p.params[0]) - 1, 0])
    arguments = {I: indices, R: p.params[0][indices], T: p.params[0]}
    with np.errstate(all="ignore"):
        arguments[row[0]] = row[1](arguments[row[0]])
    given, is_lazy = [*arguments.values()], route == "lazy"
    call = lambda: p.adam.apply_sparse(*given, lazy=is_lazy)
    word = "" if "grad_rows" in row[3] else row[0]
    return Refused(call, row[2], (word, row[3]), kept=arrays_in(*given))


@faults("rows to zero", {"that are written": 0}, ("params", "m"), ("zeroing table",))
def _rows_of_what_is_written(p: Program, route: str, _: Any) -> Refused:
    need(p.adam.zero_grad, p.is_built, len(p.params) == 1, p.pick(is_table) == 0)
    table = p.params[0] if route == "params" else p.state(route, 0)
    need(table is not None and table.dtype == p.params[0].dtype)
    call = lambda: p.adam.apply_sparse(np.array([0]), table[:1], p.params[0])
    return Refused(call, ValueError, (R, "overlap"))


@faults("rows", {"of one of several": 0})
@faults("rows", {"while accumulating": 1}, programs=("accumulating table",))
def _rows_of_another_optimizer(p: Program, _: str, is_alone: bool) -> Refused:
    table, count = p.params[p.pick(is_table)], len(p.params)
    need(accumulates(p) and count == 1 if is_alone else p.is_built and count > 1)
    words = ("gradient_accumulation_steps",) if is_alone else ("apply_sparse", f": {count} par")
    return Refused(lambda: p.adam.apply_sparse(np.array([0]), table[:1], table), ValueError, words)


# -- averages, files, settings, and the process --------------------------------------------------

ELSEWHERE: dict[str, Callable[[Program], object]] = {
    "apply_sparse": lambda p: p.adam.apply_sparse(np.array([0]), p.params[0][:1], p.params[0]),
    "set_weights": lambda p: p.adam.set_weights(p.adam.get_weights()),
    "save": lambda p: p.adam.save(p.folder / "swapped"),
    "load": lambda p: p.adam.load(p.folder / "empty", p.params),
    "copy": lambda p: copy.copy(p.adam),
    "deepcopy": lambda p: copy.deepcopy(p.adam),
    "pickle": lambda p: pickle.dumps(p.adam),
}


@faults("while swapped", {"": 0}, (*OWN_STEPS, "build", *ELSEWHERE), ("swapped",))
def _while_swapped(p: Program, route: str, _: Any) -> Refused:
    need(p.adam._state.is_swapped)
    Adam().save(p.folder / "empty")
    if route in ROUTES:
        return p.step(route, ValueError, r"swap_ema\(\) again")
    need(route != "apply_sparse" or p.params[p.pick(is_table)].flags.c_contiguous)
    return Refused(lambda: ELSEWHERE[route](p), ValueError, (r"swap_ema\(\) again",))


LISTS = rows((1.0, "params"), TypeError, r"\bparams\b")
NONE = rows((None,), TypeError, r"\bparams\b")
ITEMS = rows(([0], [None], ["b"]), TypeError, r"\bparams\b")
OVERRIDES: dict[str, Wrong] = {
    "lr": ({"lr": _raising}, TypeError, "lr must be a number.*"),
    "momentum": ({"momentum": 0.1}, TypeError, "Unexpected keyword argument.*momentum.*"),
    "loss_scale": ({"loss_scale": 2.0}, ValueError, "loss_scale concerns the step.*"),
    "moments": ({"moments": "bfloat16"}, ValueError, "moments concerns the step.*"),
    "low_bits": ({"low_bits": None}, ValueError, "low_bits concerns the step.*"),
    "beta_1": ({"beta_1": 1.0}, ValueError, "beta_1 must be >= 0 and < 1.*"),
    "learning_rate": ({"learning_rate": True}, TypeError, "lr must be a real number.*"),
    "weight_decay": ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a real number.*"),
}
NO_COUNTS = (1.5, 2.0, "2", None, [2], math.nan, 1j, True, np.True_, np.array([2]))
COUNTS = rows((0, -1, -(2**63), 2**63, 2**64, HUGE), ValueError, r"\bstep\b")
COUNTS |= rows(NO_COUNTS, TypeError, "step must be an int")
THREADS = rows((0, -1, -(2**31), 4097, 2**32 + 1), ValueError, "threads.*>= 1")
THREADS |= rows((2**64 + 1, -(2**64), HUGE), EITHER, "threads")
THREADS |= rows(NO_COUNTS, TypeError, "threads must be an integer")
# No machine has all of these.
FOREIGN = sorted({"avx2", "avx512", "neon"} - {*supported_isas()})
NAMES = ("", "sse9", "AVX2 ", "auto", "baseline\0", "\ud800", *FOREIGN)
ISAS = rows(NAMES, ValueError, *supported_isas())
ISAS |= {repr(x): (x, TypeError, ".+") for x in (None, 2, b"avx2", ["baseline"])}
READ_ONLY = ("iterations", "skipped_steps", "current_loss_scale", "current_lr", "weights", "ema")
ATTRIBUTES: dict[str, Wrong] = {name: (name, AttributeError, ".*") for name in READ_ONLY}

CALLS: list[tuple[str, Callable[[Program, Any], object], dict[str, Wrong]]] = [
    ("build", lambda p, x: p.adam.build(x), LISTS | NONE),
    ("get_updates", lambda p, x: p.adam.get_updates(p.grads, x), LISTS | NONE),
    ("get_gradients", lambda p, x: p.adam.get_gradients(p.grads, x), LISTS | NONE),
    ("excluding", lambda p, x: p.adam.exclude_from_weight_decay(x), LISTS | ITEMS),
    ("override", lambda p, x: p.adam.override(x), LISTS | ITEMS),
    ("override by", lambda p, x: p.adam.override(p.params, **x), OVERRIDES),
    ("adam_step number", lambda p, x: adam_step(**p.arguments(), step=x), COUNTS),
    (
        "save",
        lambda p, x: p.adam.save(p.folder / x),
        {"": ("missing/adam", (OSError, ValueError), ".+")},
    ),
    ("threads", lambda _, x: set_num_threads(x), THREADS),
    ("isa", lambda _, x: set_isa(x), ISAS),
    ("attribute", lambda p, x: setattr(p.adam, x, 7), ATTRIBUTES),
]


def _call(call: Callable[[Program, Any], object], p: Program, _: str, row: Wrong) -> Refused:
    return Refused(lambda: call(p, row[0]), row[1], pattern=row[2])


for name, call, wrong in CALLS:
    faults(name, wrong)(partial(_call, call))


# Of a program that allows any value of each setting.
EACH_BAD_VALUE = {f"{i} {bad}": bad for i, bad in enumerate(BAD_VALUES)}


@faults("setting", EACH_BAD_VALUE, programs=("schedule",))
def _setting(p: Program, _: str, bad: BadValue) -> Refused:
    return Refused(lambda: setattr(p.adam, bad.name, bad.value), bad.errors, pattern=bad.pattern)


FORMATS = (("gradient_accumulation_steps", 5), ("moments", "packed"), ("low_bits", "int8"))
ON, OFF = ((("amsgrad", is_on), ("use_ema", is_on)) for is_on in (True, False))


@faults("option of the state", {str(row): row for row in (*FORMATS, *ON)})
@faults("option of the state", {str(row): row for row in OFF}, programs=("zeroing",))
def _option_of_the_state(p: Program, _: str, row: tuple[str, Any]) -> Refused:
    need(p.is_built, getattr(p.adam, row[0]) != row[1])
    return Refused(lambda: setattr(p.adam, *row), ValueError, (rf"\b{row[0]}\b",))


@faults("swap without averages", {"": 0}, programs=ALSO_FRESH)
def _no_averages(p: Program, *_: Any) -> Refused:
    need(not p.adam.use_ema)
    return Refused(p.adam.swap_ema, ValueError, (r"\buse_ema\b",))
