# SPDX-License-Identifier: MIT
"""Every refused call: its message says what, where and why, and the call changes nothing.

The tests require the argument's name and index, the key words of the rule and the received value in
a message. The wording is free, except for the messages of Keras.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import autograd.numpy as anp
import fusedadam
import numpy as np
import pytest
from fresh_python import run_python
from fusedadam import Adam, adam_step
from helpers import Array, assert_all_same_bits, assert_same_bits, misaligned, read_only, values

SHAPES_AND_DTYPES = [((3,), "float64"), ((4, 6), "float32"), ((), "float32")]
BAD = 1  # the position made invalid below: two-dimensional, float32, not the first


class Training:
    """An optimizer (after two steps unless `fresh`) and all that a refused call must keep."""

    def __init__(self, *, fresh: bool = False, **options: Any) -> None:
        rng = np.random.default_rng(11)
        self.params = [values(rng, shape, dtype) for shape, dtype in SHAPES_AND_DTYPES]
        self.grads = [values(rng, shape, dtype) for shape, dtype in SHAPES_AND_DTYPES]
        self.m = [values(rng, shape, dtype) for shape, dtype in SHAPES_AND_DTYPES]
        self.v = [np.asarray(np.abs(m)) for m in self.m]
        defaults = {"lr": 0.01, "decay": 0.1, "clipnorm": 50.0, "clipvalue": 2.0}
        self.optimizer = Adam(**{**defaults, **options})
        for _ in range(0 if fresh else 2):
            self.optimizer.apply_gradients(list(zip(self.grads, self.params, strict=True)))

    def snapshot(self) -> dict[str, Any]:
        arrays = {"params": self.params, "grads": self.grads, "m": self.m, "v": self.v}
        return {
            "iterations": self.optimizer.iterations,
            "skipped_steps": self.optimizer.skipped_steps,
            "current_loss_scale": self.optimizer.current_loss_scale,
            # A schedule without an importable name has no configuration.
            "config": None if callable(self.optimizer.lr) else self.optimizer.get_config(),
            "repr": repr(self.optimizer),
            "isa": fusedadam.active_isa(),
            "threads": fusedadam.get_num_threads(),
            "weights": [w.copy() for w in self.optimizer.weights],
            "ema": [a.copy() for a in self.optimizer.ema],
            **{name: [a.copy() for a in group] for name, group in arrays.items()},
        }


def assert_unchanged(training: Training, before: dict[str, Any]) -> None:
    after = training.snapshot()
    for what, old in before.items():
        if isinstance(old, list):
            assert_all_same_bits(after[what], old, what)
        else:
            assert after[what] == old, what


def assert_goes_on(training: Training, twin: Training) -> None:
    """Further valid steps of both are equal: the refused call left no trace inside either."""
    for t in (training, twin):
        t.optimizer.apply_gradients(list(zip(t.grads, t.params, strict=True)))
        adam_step(t.params, t.grads, t.m, t.v, step=3)
    assert_unchanged(training, twin.snapshot())


def message(*parts: str, received: str = ".+") -> str:
    """A pattern for a whole message: all of `parts` in any order, then the received value."""
    return "".join(f"(?=.*{part})" for part in parts) + f".*[Rr]eceived: {received}"


def assert_refused(
    training: Training,
    call: Callable[[], object],
    error: type[Exception] | tuple[type[Exception], ...],
    pattern: str,
    *,
    twin: Training | None = None,
) -> None:
    before = training.snapshot()
    with pytest.raises(error) as caught:
        call()
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), f"message: {caught.value}"
    assert_unchanged(training, before)
    if twin is not None:
        assert_goes_on(training, twin)


@pytest.fixture(params=[False, True], ids=["built", "fresh"])
def pair(request: pytest.FixtureRequest) -> tuple[Training, Training]:
    """A training, and a twin without the refused call."""
    return Training(fresh=request.param), Training(fresh=request.param)


@pytest.fixture
def training() -> Training:
    return Training()


# -- one bad array ----------------------------------------------------------------------------


class Fault(NamedTuple):
    make: Callable[[Array], Any]  # from the valid array
    error: type[Exception]
    rule: str


def strided(a: Array) -> Array:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    view: Array = wide[..., ::2]
    return view


def cast(dtype: str) -> Callable[[Array], Array]:
    return lambda a: a.astype(dtype)


FLOAT_DTYPE = "float32"
GAPS = r"fill its memory without gaps or overlaps.*numpy\.ascontiguousarray\("
WRITTEN_FAULTS = {
    "a list": Fault(lambda a: a.tolist(), TypeError, "ndarray"),
    "a NumPy scalar": Fault(lambda _: np.float32(1), TypeError, "ndarray"),
    "a float": Fault(lambda _: 1.0, TypeError, "ndarray"),
    "None": Fault(lambda _: None, TypeError, "ndarray"),
    "a memoryview": Fault(lambda a: a.data, TypeError, "ndarray"),
    "int16": Fault(cast("int16"), TypeError, FLOAT_DTYPE),
    "longdouble": Fault(cast("longdouble"), TypeError, FLOAT_DTYPE),
    "int32": Fault(cast("int32"), TypeError, FLOAT_DTYPE),
    "bool": Fault(cast("bool"), TypeError, FLOAT_DTYPE),
    "complex64": Fault(cast("complex64"), TypeError, rf"{FLOAT_DTYPE}.*\.view\(numpy\.float32"),
    "object": Fault(cast("object"), TypeError, FLOAT_DTYPE),
    "a record": Fault(lambda a: a.view([("x", "f4")]), TypeError, FLOAT_DTYPE),
    "swapped bytes": Fault(
        lambda a: a.astype(a.dtype.newbyteorder()), TypeError, "(byte order|endian)"
    ),
    "misaligned": Fault(misaligned, ValueError, "align"),
    "strided": Fault(strided, ValueError, GAPS),
    "strided in Fortran order": Fault(lambda a: strided(a.T).T, ValueError, GAPS),
    "reversed": Fault(lambda a: a[::-1].copy()[::-1], ValueError, GAPS),
    "reversed in Fortran order": Fault(lambda a: a.T[::-1].copy()[::-1].T, ValueError, GAPS),
    "broadcast": Fault(lambda a: np.broadcast_to(a[0], a.shape), ValueError, GAPS),
    "overlapping": Fault(
        lambda a: np.lib.stride_tricks.as_strided(a.copy(), strides=(4, 4)), ValueError, GAPS
    ),
    "read-only": Fault(read_only, ValueError, r"writeable.*numpy\.array\("),
    "masked": Fault(np.ma.array, TypeError, r"mask.*\.filled\("),
    "masked in part": Fault(lambda a: np.ma.masked_less(a, 0), TypeError, "mask"),
}
GRADIENT_FAULTS = {
    **{
        dtype: Fault(cast(dtype), TypeError, r"\bfloat32\b.*same_kind.*\.astype\(")
        for dtype in ("complex64", "complex128", "object", "str", "bytes", "timedelta64[s]")
    },
    "a record": Fault(lambda a: a.view([("x", "f4")]), TypeError, "same_kind"),
    "complex numbers": Fault(lambda a: (a + 1j).tolist(), TypeError, "same_kind"),
    "text": Fault(lambda _: "gradient", TypeError, "array"),
    "no array at all": Fault(lambda _: object(), TypeError, "(same_kind|array)"),
    "ragged lists": Fault(lambda _: [[1.0], [1.0, 2.0]], TypeError, "array"),
    "masked": Fault(np.ma.array, TypeError, r"mask.*\.filled\("),
    "masked in part": Fault(lambda a: np.ma.masked_less(a, 0), TypeError, "mask"),
    "transposed": Fault(lambda a: a.T, ValueError, "shape"),
    "flat": Fault(lambda a: a.ravel(), ValueError, "shape"),
    "one axis more": Fault(lambda a: a[..., None], ValueError, "shape"),
    "to be broadcast": Fault(lambda a: a[:1], ValueError, "shape"),
    "a scalar": Fault(lambda _: np.float32(1), ValueError, "shape"),
    "empty": Fault(lambda a: a[:0], ValueError, "shape"),
}


def by_apply_gradients(t: Training, params: list[Any], grads: list[Any]) -> object:
    return t.optimizer.apply_gradients(list(zip(grads, params, strict=True)))


def by_get_updates(t: Training, params: list[Any], grads: list[Any]) -> object:
    return t.optimizer.get_updates(grads, params)


def by_get_gradients(t: Training, params: list[Any], grads: list[Any]) -> object:
    return t.optimizer.get_gradients(grads, params)


def by_build(t: Training, params: list[Any], grads: list[Any]) -> object:  # noqa: ARG001
    t.optimizer.build(params)
    return None


def by_adam_step(t: Training, params: list[Any], grads: list[Any]) -> object:
    adam_step(params, grads, t.m, t.v, step=3)
    return None


Route = Callable[[Training, list[Any], list[Any]], object]
STEPS: list[Route] = [by_apply_gradients, by_get_updates, by_adam_step]


def spoilt(arrays: list[Array], fault: Fault) -> list[Any]:
    bad: list[Any] = list(arrays)
    bad[BAD] = fault.make(arrays[BAD])
    return bad


@pytest.mark.parametrize("route", [*STEPS, by_build])
@pytest.mark.parametrize("fault", WRITTEN_FAULTS.values(), ids=WRITTEN_FAULTS)
def test_parameter_that_cannot_be_updated_in_place(
    pair: tuple[Training, Training], fault: Fault, route: Route
) -> None:
    training, twin = pair
    params = spoilt(training.params, fault)
    error, rule = fault.error, fault.rule
    errors: tuple[type[Exception], ...] = (error,)
    if training.optimizer.iterations and error is TypeError:
        # The dtype of the moments is wrong as well, and either error may be reported.
        errors, rule = (TypeError, ValueError), f"({rule}|build)"
    name = rf"(params|grads_and_vars)\[{BAD}\]"
    assert_refused(
        training,
        lambda: route(training, params, training.grads),
        errors,
        message(name, rule),
        twin=twin,
    )


@pytest.mark.parametrize("name", ["params", "m", "v"])
@pytest.mark.parametrize("fault", WRITTEN_FAULTS.values(), ids=WRITTEN_FAULTS)
def test_adam_step_array_that_cannot_be_updated_in_place(
    training: Training, fault: Fault, name: str
) -> None:
    arguments: dict[str, Any] = {"params": training.params, "m": training.m, "v": training.v}
    arguments[name] = spoilt(arguments[name], fault)
    assert_refused(
        training,
        lambda: adam_step(grads=training.grads, step=3, **arguments),
        fault.error,
        message(rf"\b{name}\[{BAD}\]", fault.rule),
        twin=Training(),
    )


@pytest.mark.parametrize("name", ["params", "m", "v"])
@pytest.mark.parametrize("fault", WRITTEN_FAULTS.values(), ids=WRITTEN_FAULTS)
def test_adam_step_single_array_that_cannot_be_updated_in_place(
    training: Training, fault: Fault, name: str
) -> None:
    arguments: dict[str, Any] = {
        "params": training.params[BAD],
        "m": training.m[BAD],
        "v": training.v[BAD],
    }
    bad = arguments[name] = fault.make(arguments[name])
    error: Any = fault.error
    pattern = message(rf"\b{name}\b", fault.rule)
    if isinstance(bad, list | memoryview):
        # One argument is a sequence and three are not. The message may name any of them.
        error, pattern = (TypeError, ValueError), message("(params|grads|m|v)")
    elif not isinstance(bad, np.ndarray):
        pattern = message(rf"\b{name}\b")
    assert_refused(
        training,
        lambda: adam_step(grads=training.grads[BAD], step=3, **arguments),
        error,
        pattern,
        twin=Training(),
    )


@pytest.mark.parametrize("name", ["vhat", "ema"])
@pytest.mark.parametrize("fault", WRITTEN_FAULTS.values(), ids=WRITTEN_FAULTS)
def test_adam_step_optional_array_that_cannot_be_updated_in_place(
    training: Training, fault: Fault, name: str
) -> None:
    good = [np.ones_like(p) for p in training.params]
    arrays = training.params, training.grads, training.m, training.v
    given: dict[str, Any] = {"vhat": good, "ema": [a.copy() for a in good]}
    given[name] = spoilt(given[name], fault)
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=3, **given),
        fault.error,
        message(rf"\b{name}\[{BAD}\]", fault.rule),
        twin=Training(),
    )
    assert_all_same_bits(good, [np.ones_like(p) for p in training.params])


@pytest.mark.parametrize("name", ["vhat", "ema"])
@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (cast("float64"), TypeError, "(dtype|float32)"),
        (lambda a: a.T.copy(), ValueError, "shape"),
        (lambda a: a[:2].copy(), ValueError, "shape"),
        (np.asfortranarray, ValueError, r"order in memory of params\[1\].*numpy\.zeros_like"),
    ],
    ids=["float64", "transposed", "shorter", "Fortran order"],
)
def test_adam_step_optional_array_unlike_its_parameter(
    training: Training, name: str, make: Callable[[Array], Array], error: type[Exception], rule: str
) -> None:
    arrays = training.params, training.grads, training.m, training.v
    given: dict[str, Any] = {
        name: spoilt([np.ones_like(p) for p in training.params], Fault(make, error, rule))
    }
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=3, **given),
        error,
        message(rf"\b{name}\[{BAD}\]", rule),
        twin=Training(),
    )


@pytest.mark.parametrize("name", ["vhat", "ema"])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda a: a[:-1], ValueError),
        (lambda a: [*a, a[0]], ValueError),
        (lambda _: [], ValueError),
        (lambda a: a[0], (TypeError, ValueError)),
        (lambda _: 1.0, TypeError),
        (lambda _: "arrays", TypeError),
    ],
    ids=["fewer", "more", "none", "one array", "a number", "text"],
)
def test_adam_step_optional_argument_that_is_no_list_as_long_as_params(
    training: Training, name: str, make: Callable[[Any], Any], error: Any
) -> None:
    arrays = training.params, training.grads, training.m, training.v
    given: dict[str, Any] = {name: make([np.ones_like(p) for p in training.params])}
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=3, **given),
        error,
        message(rf"\b{name}\b"),
        twin=Training(),
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((name, "vhat") for name in ["params", "m", "v"]),
        *((name, "ema") for name in ["params", "m", "v", "vhat"]),
    ],
)
def test_adam_step_optional_array_that_overlaps(one: str, other: str) -> None:
    arguments: dict[str, Any] = {
        name: [np.ones(4, "float32") for _ in range(2)]
        for name in ["params", "grads", "m", "v", "vhat", "ema"]
    }
    arguments[one][0] = arguments[other][1]
    with pytest.raises(ValueError, match=rf"\b({one}\[0\]|{other}\[1\]).*overlap.*Received: .+"):
        adam_step(**arguments, step=1)
    for name, arrays in arguments.items():
        assert all(np.all(a == 1) for a in arrays), name


@pytest.mark.parametrize("name", ["m", "v"])
@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (cast("float64"), TypeError, "(dtype|float32)"),
        (lambda a: a.T.copy(), ValueError, "shape"),
        (lambda a: a.ravel().copy(), ValueError, "shape"),
        (lambda a: a[:2].copy(), ValueError, "shape"),
        (np.asfortranarray, ValueError, r"order in memory of params\[1\].*numpy\.zeros_like"),
    ],
    ids=["float64", "transposed", "flat", "shorter", "Fortran order"],
)
def test_adam_step_moment_unlike_its_parameter(
    training: Training, name: str, make: Callable[[Array], Array], error: type[Exception], rule: str
) -> None:
    arguments: dict[str, Any] = {"m": training.m, "v": training.v}
    arguments[name] = spoilt(arguments[name], Fault(make, error, rule))
    assert_refused(
        training,
        lambda: adam_step(training.params, training.grads, step=3, **arguments),
        error,
        message(rf"\b{name}\[{BAD}\]", rule),
        twin=Training(),
    )


GRADIENT_NAME = rf"(grads|gradients|loss|grads_and_vars)\[{BAD}\]"


@pytest.mark.parametrize("route", [*STEPS, by_get_gradients])
@pytest.mark.parametrize("fault", GRADIENT_FAULTS.values(), ids=GRADIENT_FAULTS)
def test_gradient_unlike_its_parameter(
    pair: tuple[Training, Training], fault: Fault, route: Route
) -> None:
    training, twin = pair
    grads = spoilt(training.grads, fault)
    assert_refused(
        training,
        lambda: route(training, training.params, grads),
        fault.error,
        message(GRADIENT_NAME, fault.rule),
        twin=twin,
    )


# `apply_gradients` freezes the parameter instead (test_freezing.py).
@pytest.mark.parametrize("route", [by_get_updates, by_adam_step, by_get_gradients])
def test_gradient_that_is_none(pair: tuple[Training, Training], route: Route) -> None:
    training, twin = pair
    grads: list[Any] = list(training.grads)
    grads[BAD] = None
    assert_refused(
        training,
        lambda: route(training, training.params, grads),
        ValueError,
        rf"An operation has `None` for gradient\. .*\[{BAD}\].*",
        twin=twin,
    )


def test_gradient_that_is_none_alone(training: Training) -> None:
    arrays: list[Any] = [training.params[0], None, training.m[0], training.v[0]]
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=1),
        (ValueError, TypeError),
        r"(An operation has `None` for gradient\. .+|.*grads.*Received: .*None.*)",
        twin=Training(),
    )


# -- counts and containers --------------------------------------------------------------------


@pytest.mark.parametrize("route", [by_get_updates, by_get_gradients, by_adam_step])
@pytest.mark.parametrize("change", ["fewer", "more", "none"])
def test_gradients_that_are_not_as_many_as_parameters(
    pair: tuple[Training, Training], change: str, route: Route
) -> None:
    training, twin = pair
    changed = {
        "fewer": training.grads[:-1],
        "more": [*training.grads, training.grads[0]],
        "none": [],
    }
    grads = changed[change]
    assert_refused(
        training,
        lambda: route(training, training.params, grads),
        ValueError,
        message("(grad|loss)", "3", received=f".*{len(grads)}.*"),
        twin=twin,
    )


@pytest.mark.parametrize("name", ["params", "grads", "m", "v"])
def test_adam_step_lists_of_different_lengths(training: Training, name: str) -> None:
    arguments: dict[str, Any] = {
        "params": training.params,
        "grads": training.grads,
        "m": training.m,
        "v": training.v,
    }
    arguments[name] = arguments[name][:-1]
    assert_refused(
        training,
        lambda: adam_step(**arguments, step=1),
        ValueError,
        message("(params|grads|m|v)", "3", received=".*2.*|.*3.*"),
        twin=Training(),
    )


@pytest.mark.parametrize("name", ["params", "grads", "m", "v"])
@pytest.mark.parametrize("bad", [None, 1.0, "params", b"params"], ids=repr)
def test_adam_step_argument_that_is_neither_array_nor_sequence(
    training: Training, name: str, bad: Any
) -> None:
    arguments: dict[str, Any] = {
        "params": training.params,
        "grads": training.grads,
        "m": training.m,
        "v": training.v,
    }
    arguments[name] = bad
    assert_refused(
        training,
        lambda: adam_step(**arguments, step=1),
        (TypeError, ValueError) if name == "grads" else TypeError,
        message(rf"\b{name}\b"),
        twin=Training(),
    )


@pytest.mark.parametrize("bad", [None, 1.0, "params"], ids=repr)
@pytest.mark.parametrize("method", ["build", "get_updates", "get_gradients"])
def test_params_that_are_no_sequence(
    pair: tuple[Training, Training], method: str, bad: Any
) -> None:
    training, twin = pair
    loss = [] if method == "build" else [training.grads]
    assert_refused(
        training,
        lambda: getattr(training.optimizer, method)(*loss, bad),
        TypeError,
        message(r"\bparams\b"),
        twin=twin,
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda _: None, r"grads_and_vars\b"),
        (lambda _: 3.0, r"grads_and_vars\b"),
        (lambda t: [(t.grads[0], t.params[0]), t.params[1]], r"grads_and_vars\[1\]"),
        (lambda t: [(t.grads[0], t.params[0]), (t.grads[1],)], r"grads_and_vars\[1\]"),
        (
            lambda t: [(t.grads[0], t.params[0]), (t.grads[1], t.params[1], 0)],
            r"grads_and_vars\[1\]",
        ),
        (lambda t: [(t.grads[0], t.params[0]), None], r"grads_and_vars\[1\]"),
    ],
    ids=["None", "a number", "no pair", "too short", "too long", "None inside"],
)
def test_grads_and_vars_that_are_no_pairs(
    pair: tuple[Training, Training], make: Callable[[Training], Any], name: str
) -> None:
    training, twin = pair
    assert_refused(
        training,
        lambda: training.optimizer.apply_gradients(make(training)),
        (TypeError, ValueError),
        message(name),
        twin=twin,
    )


class TornPair(tuple[Array, Array]):
    """Reports a length of two but yields one element."""

    def __iter__(self) -> Iterator[Array]:
        yield self[0]


# Tuples are unpacked without calling their methods.
@pytest.mark.parametrize("fresh", [False, True], ids=["built", "fresh"])
def test_pairs_that_cannot_be_unpacked(fresh: bool) -> None:
    training, twin = (Training(fresh=fresh) for _ in range(2))
    pairs = list(zip(training.grads, training.params, strict=True))
    training.optimizer.apply_gradients(list(map(TornPair, pairs)))
    twin.optimizer.apply_gradients(list(zip(twin.grads, twin.params, strict=True)))
    assert_unchanged(training, twin.snapshot())


class BrokenError(Exception):
    pass


def breaking_generator(t: Training) -> Iterator[tuple[Array, Array]]:
    yield t.grads[0], t.params[0]
    raise BrokenError("from the caller's own generator")


class BreakingSequence(Sequence[Array]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise BrokenError("from the caller's own sequence")


@pytest.mark.parametrize("name", ["params", "grads", "m", "v"])
def test_sequence_that_breaks_passes_its_own_error_on(training: Training, name: str) -> None:
    arguments: dict[str, Any] = {
        "params": training.params,
        "grads": training.grads,
        "m": training.m,
        "v": training.v,
    }
    arguments[name] = BreakingSequence()
    assert_refused(
        training,
        lambda: adam_step(**arguments, step=1),
        BrokenError,
        "from the caller's own sequence",
        twin=Training(),
    )


def test_generator_that_breaks_passes_its_own_error_on(pair: tuple[Training, Training]) -> None:
    training, twin = pair
    assert_refused(
        training,
        lambda: training.optimizer.apply_gradients(breaking_generator(training)),
        BrokenError,
        "from the caller's own generator",
        twin=twin,
    )


# -- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
@pytest.mark.parametrize(
    "loss", [0.25, np.float32(0.25), None, "loss", {"loss": 1}, {1.0}, 3], ids=repr
)
def test_loss_of_another_kind(pair: tuple[Training, Training], method: str, loss: Any) -> None:
    training, twin = pair
    assert_refused(
        training,
        lambda: getattr(training.optimizer, method)(loss, training.params),
        TypeError,
        message(r"\bloss\b", "callable", r"torch\.Tensor", "sequence"),
        twin=twin,
    )


def not_scalar(params: Any) -> Any:
    return params[0] * 2.0


def broken(params: Any) -> Any:
    raise BrokenError(f"from the caller's own loss of {len(params)} parameters")


@pytest.mark.parametrize("method", ["get_updates", "get_gradients"])
@pytest.mark.parametrize(
    ("loss", "error", "pattern"),
    [(not_scalar, (TypeError, ValueError), ".*scalar.*"), (broken, BrokenError, "from the .*")],
    ids=["not scalar", "raises"],
)
def test_callable_loss_that_fails(
    pair: tuple[Training, Training],
    method: str,
    loss: Callable[[Any], Any],
    error: Any,
    pattern: str,
) -> None:
    training, twin = pair
    assert_refused(
        training,
        lambda: getattr(training.optimizer, method)(loss, training.params),
        error,
        pattern,
        twin=twin,
    )


def test_callable_loss_does_not_rescue_a_bad_parameter(pair: tuple[Training, Training]) -> None:
    training, twin = pair
    params = spoilt(training.params, WRITTEN_FAULTS["strided"])
    assert_refused(
        training,
        lambda: training.optimizer.get_updates(lambda p: anp.sum(p[1]) + anp.sum(p[0]), params),
        ValueError,
        message(rf"params\[{BAD}\]", GAPS),
        twin=twin,
    )


# -- overlapping arrays -----------------------------------------------------------------------

# Two float32 tensors of four elements out of one buffer of twelve.
OVERLAPPING: dict[str, Callable[[Array], list[Array]]] = {
    "one array twice": lambda b: [b[:4]] * 2,
    "one view twice": lambda b: [b[:4], b[:4]],
    "one element shared": lambda b: [b[:4], b[3:7]],
    "in the other order": lambda b: [b[3:7], b[:4]],
    "another shape": lambda b: [b[:4].reshape(2, 2), b[2:6]],
    "another dtype": lambda b: [b[:4], b.view("float64")[1:5]],
    "one inside the other": lambda b: [b[:8], b[2:6]],
    "not neighbours in the list": lambda b: [b[:4], b[8:], b[2:6]],
    "a 0-d inside": lambda b: [b[:4], b[3:4].reshape(())],
}


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("method", ["build", "get_updates", "apply_gradients"])
def test_parameters_that_overlap(method: str, views: Callable[[Array], list[Array]]) -> None:
    buffer = np.arange(12, dtype="float32")
    params = views(buffer)
    grads = [np.ones_like(p) for p in params]
    optimizer = Adam()
    calls: dict[str, Callable[[], object]] = {
        "build": lambda: optimizer.build(params),
        "get_updates": lambda: optimizer.get_updates(grads, params),
        "apply_gradients": lambda: optimizer.apply_gradients(list(zip(grads, params, strict=True))),
    }
    with pytest.raises(ValueError, match=r"\[\d\].*overlap.*Received: .+"):
        calls[method]()
    assert_same_bits(buffer, np.arange(12, dtype="float32"))
    assert optimizer.iterations == 0
    assert optimizer.weights == []


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_overlap_after_ones_that_did_not(
    views: Callable[[Array], list[Array]],
) -> None:
    # The parameters of the first step were checked. Those of a later step are other arrays.
    buffer = np.arange(12, dtype="float32")
    params = views(buffer)
    grads = [np.ones_like(p) for p in params]
    optimizer = Adam()
    optimizer.get_updates(grads, [p.copy() for p in params])
    before = optimizer.get_weights()
    with pytest.raises(ValueError, match=r"\[\d\].*overlap.*Received: .+"):
        optimizer.get_updates(grads, params)
    assert_same_bits(buffer, np.arange(12, dtype="float32"))
    assert_all_same_bits(optimizer.get_weights(), before)
    assert optimizer.iterations == 1


@pytest.mark.parametrize("position", [1, 2, 3, 4], ids=["m[0]", "m[1]", "v[0]", "v[1]"])
def test_parameter_that_is_one_of_the_optimizers_moments(position: int) -> None:
    params = [np.arange(4, dtype="float32") for _ in range(2)]
    grads = [np.ones(4, "float32") for _ in range(2)]
    optimizer = Adam()
    optimizer.get_updates(grads, params)
    before = optimizer.get_weights()
    with pytest.raises(ValueError, match=r"\[\d\].*overlap.*Received: .+"):
        optimizer.get_updates(grads, [params[0], optimizer.weights[position]])
    assert_all_same_bits(optimizer.get_weights(), before)
    assert optimizer.iterations == 1


ROLES = ["params", "m", "v"]


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("role", ROLES)
def test_adam_step_arrays_that_overlap_within_one_argument(
    role: str, views: Callable[[Array], list[Array]]
) -> None:
    buffer = np.arange(12, dtype="float32")
    arrays = views(buffer)
    arguments: dict[str, Any] = {
        name: [np.ones_like(a) for a in arrays] for name in [*ROLES, "grads"]
    }
    arguments[role] = arrays
    with pytest.raises(ValueError, match=rf"\b{role}\[\d\].*overlap.*Received: .+"):
        adam_step(**arguments, step=1)
    assert_same_bits(buffer, np.arange(12, dtype="float32"))
    for name in set(arguments) - {role}:
        assert all(np.all(a == 1) for a in arguments[name]), name


@pytest.mark.parametrize(("one", "other"), [("params", "m"), ("params", "v"), ("m", "v")])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("shift", [0, 3])
def test_adam_step_arrays_that_overlap_between_arguments(
    one: str, other: str, index: int, shift: int
) -> None:
    buffer = np.arange(12, dtype="float32")
    arguments: dict[str, Any] = {
        name: [np.ones(4, "float32") for _ in range(2)] for name in [*ROLES, "grads"]
    }
    arguments[one][0] = buffer[:4]
    arguments[other][index] = buffer[shift : shift + 4]
    with pytest.raises(
        ValueError, match=rf"\b({one}\[0\]|{other}\[{index}\]).*overlap.*Received: .+"
    ):
        adam_step(**arguments, step=1)
    assert_same_bits(buffer, np.arange(12, dtype="float32"))
    for name, arrays in arguments.items():
        assert all(np.all(a == 1) for a in arrays if a.base is not buffer), name


@pytest.mark.parametrize(("one", "other"), [("params", "m"), ("params", "v"), ("m", "v")])
def test_adam_step_single_arrays_that_overlap(one: str, other: str) -> None:
    arguments: dict[str, Any] = {name: np.ones(4, "float32") for name in [*ROLES, "grads"]}
    arguments[other] = arguments[one]
    with pytest.raises(ValueError, match=rf"\b({one}|{other})\b.*overlap.*Received: .+"):
        adam_step(**arguments, step=1)
    assert all(np.all(a == 1) for a in arguments.values())


# -- parameters that do not match the moments -------------------------------------------------

CHANGED: dict[str, Callable[[list[Array]], list[Array]]] = {
    "fewer": lambda p: p[:-1],
    "more": lambda p: [*p, np.ones(2)],
    "none": lambda _: [],
    "another order": lambda p: p[::-1],
    "another shape": lambda p: [p[0], p[1].T.copy(), p[2]],
    "another size": lambda p: [p[0], p[1][:2].copy(), p[2]],
    "another rank": lambda p: [p[0], p[1].reshape(-1), p[2]],
    "another dtype": lambda p: [p[0], p[1].astype("float64"), p[2]],
}


@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates])
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_parameters_unlike_those_that_built_the_moments(
    training: Training, change: Callable[[list[Array]], list[Array]], route: Route
) -> None:
    params = change(training.params)
    kept = [p.copy() for p in params]
    assert_refused(
        training,
        lambda: route(training, params, [np.ones_like(p) for p in params]),
        ValueError,
        message(r"\b(params|grads_and_vars)\b", r"\bbuild\b"),
    )
    assert_all_same_bits(params, kept)
    assert_goes_on(training, Training())


# -- gradients and parameters at wrong positions ----------------------------------------------


def by_step(t: Training, params: list[Any], grads: list[Any]) -> object:
    return t.optimizer.step(params, grads)


class Alike(Training):
    """Three parameters of one shape and dtype that differ only in their memory."""

    def __init__(self, *, built: bool, **options: Any) -> None:
        super().__init__(fresh=True, **options)
        rng = np.random.default_rng(12)
        self.params, self.grads, self.m = (
            [values(rng, (2, 3), "float32") for _ in range(3)] for _ in range(3)
        )
        self.v = [np.asarray(np.abs(m)) for m in self.m]
        if built:
            self.optimizer.build(self.params)
        else:
            self.optimizer.apply_gradients(list(zip(self.grads, self.params, strict=True)))


MISPLACED: dict[str, tuple[Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]], str]] = {
    "wrong way round": (
        lambda p, g: (g, p),
        r"grads\[0\], which was the parameter params\[0\]",
    ),
    "one pair the wrong way round": (
        lambda p, g: ([p[0], g[1], p[2]], [g[0], p[1], g[2]]),
        r"grads\[1\], which was the parameter params\[1\]",
    ),
    "wrong way round in another order": (
        lambda p, g: (g, p[::-1]),
        r"grads\[0\], which was the parameter params\[2\]",
    ),
    "wrong way round as views": (
        lambda p, g: (g, [a[:] for a in p]),
        r"grads\[0\], which was the parameter params\[0\]",
    ),
    "reversed": (lambda p, g: (p[::-1], g[::-1]), r"params\[0\], which was params\[2\]"),
    "two exchanged": (
        lambda p, g: ([p[0], p[2], p[1]], g),
        r"params\[1\], which was params\[2\]",
    ),
    "one moved, the others new": (
        lambda p, g: ([p[1], p[0].copy(), p[2].copy()], g),
        r"params\[0\], which was params\[1\]",
    ),
    "views exchanged": (
        lambda p, g: ([p[1][:], p[0][:], p[2]], g),
        r"params\[0\], which was params\[1\]",
    ),
}


@pytest.mark.parametrize("built", [True, False], ids=["built", "stepped"])
@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates, by_step])
@pytest.mark.parametrize(("place", "said"), MISPLACED.values(), ids=MISPLACED)
def test_parameters_in_other_places(
    built: bool,
    route: Route,
    place: Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]],
    said: str,
) -> None:
    training, twin = Alike(built=built), Alike(built=built)
    params, grads = place(training.params, training.grads)
    rule = "order of the steps before" if "was params" in said else "must not change places"
    assert_refused(
        training,
        lambda: route(training, params, grads),
        ValueError,
        message(rule, received=said),
        twin=twin,
    )


def test_wrong_way_round_when_gradients_are_accumulated() -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "use_ema": True}
    training, twin = Alike(built=False, **options), Alike(built=False, **options)
    assert_refused(
        training,
        lambda: by_apply_gradients(training, training.grads, training.params),
        ValueError,
        message("must not change places"),
        twin=twin,
    )


@pytest.mark.parametrize("shape", [(2, 50), (200, 500), (50, 20), (1,), (100_000,)], ids=str)
def test_parameter_resized_in_place_since_the_last_step(shape: tuple[int, ...]) -> None:
    # The same object was checked before, perhaps even the same shape tuple, but its memory differs.
    param, grad = np.arange(1000.0).reshape(20, 50).copy(), np.ones((20, 50))
    optimizer = Adam()
    optimizer.get_updates([grad], [param])
    before = optimizer.get_weights()
    param.resize(shape, refcheck=False)
    kept = param.copy()
    with pytest.raises(ValueError, match=r"params\[0\].*\bbuild\b.*Received: .+"):
        optimizer.get_updates([np.ones(shape)], [param])
    assert_same_bits(param, kept)
    assert_all_same_bits(optimizer.get_weights(), before)
    optimizer.build([param])
    optimizer.get_updates([np.ones(shape)], [param])
    assert not np.any(param == kept)


def test_parameter_made_read_only_since_the_last_step() -> None:
    param, grad = np.arange(8.0), np.ones(8)
    optimizer = Adam()
    optimizer.get_updates([grad], [param])
    before, kept = optimizer.get_weights(), param.copy()
    param.flags.writeable = False
    for call in (
        lambda: optimizer.get_updates([grad], [param]),
        lambda: optimizer.apply_gradients([(grad, param)]),
    ):
        with pytest.raises(ValueError, match=r"\[0\].*(writ|read-only).*Received: .+"):
            call()
    assert_same_bits(param, kept)
    assert_all_same_bits(optimizer.get_weights(), before)
    param.flags.writeable = True
    assert optimizer.apply_gradients([(grad, param)]) == 2


# -- hyper-parameters -------------------------------------------------------------------------

HUGE = 10**400  # too large for a float64, must not raise OverflowError
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), np.float32("nan")]
TRUTH_VALUES = [True, False, np.True_, np.array(True)]
NOT_A_NUMBER = [
    *("0.5", "fast", [0.5], (0.5,), {}, 0.5j, np.array([0.5, 0.5]), object()),
    # float() accepts these, some with a warning.
    *(*TRUTH_VALUES, np.array([0.5]), np.str_("0.5"), np.array("0.5"), np.array(b"0.5")),
    *(np.complex64(0.5), np.array(0.5j), np.timedelta64(1, "s"), np.array(True, dtype=object)),
]
AT_LEAST_0 = ["lr", "learning_rate", "epsilon", "decay", "l2"]
BETAS = ["beta_1", "beta_2"]
CLIPS = ["clipnorm", "clipnorm_per_tensor", "clipvalue"]
MAY_BE_NONE = [*CLIPS, "weight_decay", "epsilon"]
SWITCHES = [
    "bias_corrected_epsilon",
    "amsgrad",
    "use_ema",
    "skip_nonfinite",
    "zero_grad",
    "maximize",
    "flush_denormals",
]
COUNTS = ["ema_overwrite_frequency", "gradient_accumulation_steps"]


class BadValue(NamedTuple):
    name: str
    value: Any
    error: type[Exception] | tuple[type[Exception], ...]
    pattern: str


def bad_values() -> Iterator[BadValue]:
    for name in dict.fromkeys([*AT_LEAST_0, *BETAS, *MAY_BE_NONE]):
        shown = "(lr|learning_rate)" if name == "learning_rate" else name
        rule = "(>=? 0 and < 1)" if name in BETAS else "(>= 0|finite)"
        for value in NOT_FINITE:
            yield BadValue(name, value, ValueError, message(rf"\b{shown}\b", rule))
        yield BadValue(name, HUGE, (TypeError, ValueError), message(rf"\b{shown}\b"))
        for value in [*NOT_A_NUMBER, *([] if name in MAY_BE_NONE else [None])]:
            yield BadValue(name, value, TypeError, message(rf"\b{shown}\b", "real number"))
        for value in (
            [1.0, -0.5, -5e-324, 1.5, 1] if name in BETAS else [-1.0, -1, -1e-300, -5e-324]
        ):
            if name in CLIPS:
                # Keras' own wording.
                pattern = rf"Expected {name} >= 0, received: {re.escape(str(float(value)))}"
            else:
                pattern = message(rf"\b{shown}\b", rule, received=rf"{shown}={value!r}(\.0)?")
            yield BadValue(name, value, ValueError, pattern)
    for name in SWITCHES:
        for value in ["yes", 0.5, None, [], 1, 0, np.int64(1), np.array([True]), np.array("True")]:
            yield BadValue(name, value, TypeError, message(rf"\b{name}\b", "(bool|True or False)"))
    for value in [*NOT_FINITE, -0.5, -5e-324, 1.0 + 2**-52, 2]:
        yield BadValue("ema_momentum", value, ValueError, message(r"\bema_momentum\b", "1"))
    for value in [*NOT_A_NUMBER, None]:
        yield BadValue(
            "ema_momentum", value, TypeError, message(r"\bema_momentum\b", "real number")
        )
    for name in COUNTS:
        for value in [0, -1, -(2**63), np.int64(0)]:
            yield BadValue(name, value, ValueError, message(rf"\b{name}\b"))
        for value in [2**64, HUGE]:
            yield BadValue(name, value, (TypeError, ValueError), message(rf"\b{name}\b"))
        for value in [
            1.5,
            2.0,
            "2",
            [2],
            float("nan"),
            *TRUTH_VALUES,
            np.array([2]),
            np.array(2.0),
        ]:
            yield BadValue(name, value, TypeError, message(rf"\b{name}\b", "int"))
    name = "loss_scale"
    for value in [*NOT_FINITE, 0, 0.0, -1.0, 2.0**-128, 2.0**-127 * (1 - 2**-53), 2.0**128]:
        yield BadValue(name, value, ValueError, message(rf"\b{name}\b"))
    for value in ["static", "", "Dynamic"]:
        yield BadValue(name, value, ValueError, message(rf"\b{name}\b", "dynamic"))
    yield BadValue(name, HUGE, (TypeError, ValueError), message(rf"\b{name}\b"))
    for value in [*(v for v in NOT_A_NUMBER if not isinstance(v, str)), b"dynamic"]:
        yield BadValue(name, value, TypeError, message(rf"\b{name}\b"))


def shown(bad: Any) -> str:
    return f"{bad.name}={'10**400' if bad.value is HUGE else bad.value!r:.23}"


BAD_VALUES = pytest.mark.parametrize("bad", list(bad_values()), ids=shown)


@BAD_VALUES
def test_constructor_value(bad: BadValue) -> None:
    needed: dict[str, Any] = {"use_ema": True} if bad.name == "ema_overwrite_frequency" else {}
    with pytest.raises(bad.error) as caught:
        Adam(**{bad.name: bad.value}, **needed)
    assert re.fullmatch(bad.pattern, str(caught.value), re.DOTALL), f"message: {caught.value}"
    config = {
        k: v for k, v in Adam().get_config().items() if (k, bad.name) != ("lr", "learning_rate")
    }
    with pytest.raises(bad.error):
        Adam.from_config(config | needed | {bad.name: bad.value})


@BAD_VALUES
def test_attribute_value(bad: BadValue) -> None:
    # The options that it needs are set and those that it excludes are not, so only its value is
    # wrong.
    options: dict[str, Any] = {
        "use_ema": True,
        "clipnorm": None if bad.name == "clipnorm_per_tensor" else 50.0,
    }
    training = Training(**options)
    assert_refused(
        training,
        lambda: setattr(training.optimizer, bad.name, bad.value),
        bad.error,
        bad.pattern,
        twin=Training(**options),
    )


OF_ADAM_STEP = [
    *("lr", "bias_corrected_epsilon", "decay", "l2", "ema_momentum"),
    *("zero_grad", "maximize", "flush_denormals"),
    *BETAS,
    *MAY_BE_NONE,
]


@pytest.mark.parametrize(
    "bad", [bad for bad in bad_values() if bad.name in OF_ADAM_STEP], ids=shown
)
def test_adam_step_value(training: Training, bad: BadValue) -> None:
    arrays = training.params, training.grads, training.m, training.v
    options: dict[str, Any] = {bad.name: bad.value}
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=3, **options),
        bad.error,
        bad.pattern,
        twin=Training(),
    )


# Options that exclude or need each other: the arguments, and the name in the message.
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"clipnorm": 1.0, "clipnorm_per_tensor": 1.0}, "clipnorm_per_tensor"),
    ({"ema_overwrite_frequency": 2}, "ema_overwrite_frequency"),
    ({"ema_overwrite_frequency": 2, "use_ema": False}, "ema_overwrite_frequency"),
    ({"ema_momentum": 0.5}, "ema_momentum"),
    ({"ema_momentum": 0.0, "use_ema": False}, "ema_momentum"),
]


@pytest.mark.parametrize(("options", "name"), COMBINATIONS, ids=str)
def test_options_that_make_no_sense_together(options: dict[str, Any], name: str) -> None:
    pattern = message(rf"\b{name}\b")
    makes: list[Callable[[], Adam]] = [lambda: Adam(**options), lambda: Adam.from_config(options)]
    for make in makes:
        with pytest.raises(ValueError) as caught:
            make()
        assert re.fullmatch(pattern, str(caught.value), re.DOTALL), f"message: {caught.value}"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "clipnorm_per_tensor", 1.0),  # every training here has a clipnorm as well
        ({"clipnorm": None, "clipnorm_per_tensor": 1.0}, "clipnorm", 1.0),
        ({}, "ema_overwrite_frequency", 2),
        ({}, "ema_momentum", 0.5),
    ],
    ids=str,
)
def test_attribute_that_makes_no_sense_beside_the_others(
    options: dict[str, Any], name: str, value: Any
) -> None:
    training = Training(**options)
    assert_refused(
        training,
        lambda: setattr(training.optimizer, name, value),
        ValueError,
        message(rf"\b{name}\b"),
        twin=Training(**options),
    )


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [("ema_overwrite_frequency", 2, None), ("ema_momentum", 0.5, 0.99)],
)
def test_averages_cannot_be_turned_off_under_their_settings(
    name: str, value: float, off: float | None
) -> None:
    options: dict[str, Any] = {name: value}
    adam = Adam(use_ema=True, **options)
    with pytest.raises(ValueError, match=rf"{name}.*use_ema"):
        adam.use_ema = False
    assert adam.use_ema is True
    setattr(adam, name, off)
    adam.use_ema = False


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clipnorm": 1.0, "clipnorm_per_tensor": 1.0}, "clipnorm_per_tensor"),
        ({"ema_momentum": 0.5}, "ema"),
    ],
    ids=str,
)
def test_adam_step_options_that_make_no_sense_together(
    training: Training, options: dict[str, Any], name: str
) -> None:
    arrays = training.params, training.grads, training.m, training.v
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=1, **options),
        ValueError,
        message(rf"\b{name}\b"),
        twin=Training(),
    )


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "amsgrad", True),
        ({"amsgrad": True}, "amsgrad", False),
        ({}, "use_ema", True),
        ({"use_ema": True}, "use_ema", False),
        ({}, "gradient_accumulation_steps", 2),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", 3),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", None),
    ],
    ids=str,
)
def test_option_that_the_existing_state_was_not_made_for(
    options: dict[str, Any], name: str, value: Any
) -> None:
    training = Training(**options)
    assert_refused(
        training,
        lambda: setattr(training.optimizer, name, value),
        ValueError,
        message(rf"\b{name}\b"),
        twin=Training(**options),
    )


# -- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates])
@pytest.mark.parametrize(
    ("result", "error"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (np.float32("nan"), ValueError),
        ("fast", TypeError),
        (None, TypeError),
        ([0.5], TypeError),
        (1j, TypeError),
        (True, TypeError),
        (np.True_, TypeError),
    ],
    ids=repr,
)
def test_schedule_with_a_result_that_is_no_learning_rate(
    result: Any, error: type[Exception], route: Route
) -> None:
    training, twin = Training(), Training()
    training.optimizer.lr = lambda _: result
    assert_refused(
        training,
        lambda: route(training, training.params, training.grads),
        error,
        message(r"\blr\b"),
    )
    training.optimizer.lr = 0.01
    assert_goes_on(training, twin)


@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates])
def test_schedule_that_breaks_passes_its_own_error_on(
    pair: tuple[Training, Training], route: Route
) -> None:
    def schedule(iterations: int) -> float:
        raise BrokenError(f"from the caller's own schedule at {iterations}")

    training, twin = pair
    training.optimizer.lr = schedule
    assert_refused(
        training,
        lambda: route(training, training.params, training.grads),
        BrokenError,
        "from the caller's own schedule at [02]",
    )
    training.optimizer.lr = 0.01
    assert_goes_on(training, twin)


@pytest.mark.parametrize(
    "name", ["no_such_module_at_all:f", "helpers:nothing", "helpers:FLOATS", "helpers:", ":halving"]
)
def test_schedule_of_a_configuration_that_cannot_be_found(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?s)\blr\b.*Received: "):
        Adam.from_config({**Adam().get_config(), "lr": name})


# -- gradients to be zeroed -------------------------------------------------------------------

ZEROED_FAULTS = {
    name: fault
    for name, fault in WRITTEN_FAULTS.items()
    # A float16 gradient can be zeroed in place.
    if name not in ("None", "a memoryview", "a float", "a NumPy scalar", "float16")
}


@pytest.mark.parametrize("route", STEPS)
@pytest.mark.parametrize("fresh", [False, True], ids=["built", "fresh"])
@pytest.mark.parametrize("fault", ZEROED_FAULTS.values(), ids=ZEROED_FAULTS)
def test_gradient_that_cannot_be_zeroed_in_place(fault: Fault, fresh: bool, route: Route) -> None:
    training, twin = (Training(fresh=fresh, zero_grad=True) for _ in range(2))
    grads = spoilt(training.grads, fault)
    kept = np.array(grads[BAD], copy=True)

    def call() -> object:
        if route is not by_adam_step:
            return route(training, training.params, grads)
        return adam_step(training.params, grads, training.m, training.v, step=3, zero_grad=True)

    # Dtype and layout are both wrong, and either may be reported.
    assert_refused(training, call, (fault.error, TypeError), message(GRADIENT_NAME))
    np.testing.assert_array_equal(np.asarray(grads[BAD]), kept)
    by_zeroing(training, twin)


def by_zeroing(training: Training, twin: Training) -> None:
    for t in (training, twin):
        t.optimizer.apply_gradients(list(zip(t.grads, t.params, strict=True)))
    assert_unchanged(training, twin.snapshot())


SHARED: dict[str, Callable[[Training], Any]] = {
    "its parameter": lambda t: t.params[BAD],
    "a view of its parameter": lambda t: t.params[BAD].reshape(-1)[:].reshape(4, 6),
    "its m": lambda t: t.optimizer.weights[1 + BAD],
    "its v": lambda t: t.optimizer.weights[4 + BAD],
    "its vhat": lambda t: t.optimizer.weights[7 + BAD],
    "its average": lambda t: t.optimizer.ema[BAD],
}


@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates])
def test_gradient_that_is_zeroed_and_shares_memory_with_what_is_written(
    share: Callable[[Training], Any], route: Route
) -> None:
    options: dict[str, Any] = {"zero_grad": True, "amsgrad": True, "use_ema": True}
    training, twin = Training(**options), Training(**options)
    grads: list[Any] = [np.ones_like(p) for p in training.params]
    grads[BAD] = share(training)
    assert_refused(
        training,
        lambda: route(training, training.params, grads),
        ValueError,
        message(GRADIENT_NAME, "(overlap|share)"),
    )
    for t in (training, twin):
        t.grads = [np.ones_like(p) for p in t.params]
    by_zeroing(training, twin)


def test_one_zeroed_gradient_for_two_parameters() -> None:
    params, g = [np.ones(4), np.ones(4)], np.ones(4)
    adam = Adam(zero_grad=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)\[\d\].*(overlap|share).*Received: "):
            adam.apply_gradients([(g, p) for p in params])
        with pytest.raises(ValueError, match=r"(?s)\[\d\].*(overlap|share).*Received: "):
            adam_step(params, [g, g], [g * 0, g * 0], [g * 0, g * 0], step=1, zero_grad=True)
        np.testing.assert_array_equal([*params, g], 1.0)
        adam.build(params)
    # Without zeroing, the gradient is only read.
    adam.zero_grad = False
    assert adam.apply_gradients([(g, p) for p in params]) == 1


# -- swapped averages -------------------------------------------------------------------------


def by_apply_sparse(t: Training, params: list[Any], grads: list[Any]) -> object:
    return t.optimizer.apply_sparse(np.array([0]), grads[BAD][:1], params[BAD])


def by_set_weights(t: Training, params: list[Any], grads: list[Any]) -> object:  # noqa: ARG001
    t.optimizer.set_weights(t.optimizer.get_weights())
    return None


@pytest.mark.parametrize(
    "route", [by_apply_gradients, by_get_updates, by_apply_sparse, by_build, by_set_weights]
)
def test_nothing_is_written_while_averages_are_swapped(route: Route) -> None:
    training, twin = Training(use_ema=True), Training(use_ema=True)
    training.optimizer.swap_ema()
    assert_refused(
        training,
        lambda: route(training, training.params, training.grads),
        ValueError,
        r"(?s).*\bswap_ema\b.*",
    )
    training.optimizer.swap_ema()
    assert_goes_on(training, twin)


def test_save_while_averages_are_swapped(tmp_path: Path) -> None:
    training, twin = Training(use_ema=True), Training(use_ema=True)
    training.optimizer.swap_ema()
    assert_refused(
        training,
        lambda: training.optimizer.save(tmp_path / "checkpoint"),
        ValueError,
        r"(?s).*\bswap_ema\b.*",
    )
    assert list(tmp_path.iterdir()) == []
    training.optimizer.swap_ema()
    assert_goes_on(training, twin)


@pytest.mark.parametrize("fresh", [False, True])
def test_swap_without_averages(fresh: bool) -> None:
    training = Training(fresh=fresh)
    assert_refused(
        training,
        training.optimizer.swap_ema,
        ValueError,
        r"(?s).*\buse_ema\b.*",
        twin=Training(fresh=fresh),
    )


def resize(p: Array) -> None:
    p.resize((2, 3), refcheck=False)


def freeze(p: Array) -> None:
    p.flags.writeable = False


@pytest.mark.parametrize(
    ("spoil", "rule"), [(resize, "shape"), (freeze, "(writ|read-only)")], ids=["resized", "frozen"]
)
def test_swap_with_a_parameter_that_has_changed_since_the_last_step(
    spoil: Callable[[Array], None], rule: str
) -> None:
    params = [np.ones(4), np.arange(1000.0).reshape(20, 50).copy()]
    adam = Adam(use_ema=True)
    for _ in range(2):
        adam.apply_gradients([(np.ones_like(p), p) for p in params])
    averages = [a.copy() for a in adam.ema]
    spoil(params[1])
    kept = [p.copy() for p in params]
    with pytest.raises(ValueError, match=rf"(?s)params\[1\].*{rule}.*Received: "):
        adam.swap_ema()
    assert_all_same_bits(params, kept)
    assert_all_same_bits(adam.ema, averages)


def test_swap_without_parameters() -> None:
    built = Adam(use_ema=True)
    built.build([np.ones(3)])
    copied = copy.deepcopy(built)  # has averages, but no parameters before its first step
    for adam in (Adam(use_ema=True), copied):
        with pytest.raises(ValueError, match=r"(?s)\bswap_ema\b.*Received: "):
            adam.swap_ema()
        p = np.ones(3)
        assert adam.apply_gradients([(np.ones(3), p)]) == 1
        adam.swap_ema()


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, copy.copy, pickle.dumps],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copy_while_averages_are_swapped(copier: Callable[[Adam], Any]) -> None:
    # The averages hold the parameters' values, and the copy has no parameters to swap them with.
    training, twin = Training(use_ema=True), Training(use_ema=True)
    training.optimizer.swap_ema()
    assert_refused(
        training, lambda: copier(training.optimizer), ValueError, r"(?s).*\bswap_ema\b.*"
    )
    training.optimizer.swap_ema()
    assert_goes_on(training, twin)


# -- parameters without decay -----------------------------------------------------------------


@pytest.mark.parametrize("route", [by_apply_gradients, by_get_updates, by_build])
def test_excluded_array_that_is_no_parameter(pair: tuple[Training, Training], route: Route) -> None:
    training, twin = pair
    training.optimizer.weight_decay = twin.optimizer.weight_decay = 0.5
    training.optimizer.exclude_from_weight_decay([training.params[0], training.params[BAD].copy()])
    assert_refused(
        training,
        lambda: route(training, training.params, training.grads),
        ValueError,
        message(r"\bexclude_from_weight_decay\b", r"\[1\]"),
    )
    training.optimizer.exclude_from_weight_decay([])
    assert_goes_on(training, twin)


def test_excluded_position_that_fewer_parameters_lack() -> None:
    training, twin = Training(), Training()
    for t in (training, twin):
        t.optimizer.exclude_from_weight_decay([t.params[2]])
        t.optimizer.apply_gradients(list(zip(t.grads, t.params, strict=True)))
    other = [np.ones(3), np.ones(2)]
    assert_refused(
        training,
        lambda: training.optimizer.build(other),
        ValueError,
        message(r"\bexclude_from_weight_decay\b", received=".*2.*"),
        twin=twin,
    )
    training.optimizer.exclude_from_weight_decay([])
    training.optimizer.build(other)


@pytest.mark.parametrize("bad", [3.0, "bias"], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("method", ["exclude_from_weight_decay", "override"])
def test_parameters_to_find_that_are_no_sequence(
    pair: tuple[Training, Training], method: str, bad: Any
) -> None:
    training, twin = pair
    assert_refused(
        training,
        lambda: getattr(training.optimizer, method)(bad),
        TypeError,
        message(r"\bparams\b"),
        twin=twin,
    )


@pytest.mark.parametrize("bad", [None, 3.0, "bias", [1.0]], ids=lambda b: type(b).__name__)
def test_excluded_parameter_that_is_no_array(pair: tuple[Training, Training], bad: Any) -> None:
    training, twin = pair

    def exclude_and_step() -> None:
        training.optimizer.exclude_from_weight_decay([training.params[0], bad])
        by_apply_gradients(training, training.params, training.grads)

    assert_refused(training, exclude_and_step, (TypeError, ValueError), message(r"\[1\]"))
    training.optimizer.exclude_from_weight_decay([])
    assert_goes_on(training, twin)


# -- sparse rows ------------------------------------------------------------------------------


class SparseFault(NamedTuple):
    spoil: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception] | tuple[type[Exception], ...]
    parts: tuple[str, ...]


def with_indices(bad: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"indices": bad}


SPARSE_FAULTS: dict[str, SparseFault] = {
    "index too large": SparseFault(
        with_indices(np.array([0, 6, 2])), ValueError, (r"indices\[1\]", "6")
    ),
    "int32 index too large": SparseFault(
        with_indices(np.array([0, 1, 6], "int32")), ValueError, (r"indices\[2\]", "6")
    ),
    "index far too large": SparseFault(
        with_indices(np.array([2**62, 1, 0])), ValueError, (r"indices\[0\]", str(2**62))
    ),
    "negative index": SparseFault(
        with_indices(np.array([0, 1, -1])), ValueError, (r"indices\[2\]", "-1")
    ),
    "least index": SparseFault(
        with_indices(np.array([0, -(2**63), 1])), ValueError, (r"indices\[1\]",)
    ),
    **{
        f"{dtype} indices": SparseFault(
            with_indices(np.array([0, 1, 2]).astype(dtype)), TypeError, (r"\bindices\b", "int64")
        )
        for dtype in ("float64", "int16", "uint64", "uint32", "bool", "object", ">i8", "complex64")
    },
    **{
        f"a list of {type(bad[1]).__name__}": SparseFault(
            with_indices(bad), TypeError, (r"\bindices\b",)
        )
        for bad in ([0, 1.0, 2], [0, True, 2], [0, None, 2], [0, [1], 2], [0, "1", 2])
    },
    "masked indices": SparseFault(
        with_indices(np.ma.array([0, 1, 2])), TypeError, (r"\bindices\b", "mask")
    ),
    "2-D indices": SparseFault(with_indices(np.array([[0], [1], [2]])), ValueError, (r"indices",)),
    "0-d indices": SparseFault(with_indices(np.array(1)), ValueError, (r"\bindices\b",)),
    "indices None": SparseFault(with_indices(None), TypeError, (r"\bindices\b",)),
    "indices text": SparseFault(with_indices("012"), TypeError, (r"\bindices\b",)),
    "a number": SparseFault(with_indices(1), TypeError, (r"\bindices\b",)),
    "fewer rows": SparseFault(
        lambda a: {"grad_rows": a["grad_rows"][:2]}, ValueError, (r"\bgrad_rows\b", "shape")
    ),
    "more rows": SparseFault(
        lambda a: {"indices": a["indices"][:2]}, ValueError, (r"\bgrad_rows\b", "shape")
    ),
    "longer rows": SparseFault(
        lambda _: {"grad_rows": np.ones((3, 3), "float32")},
        ValueError,
        (r"\bgrad_rows\b", "shape"),
    ),
    "flat rows": SparseFault(
        lambda a: {"grad_rows": a["grad_rows"].ravel()}, ValueError, (r"\bgrad_rows\b", "shape")
    ),
    "one row": SparseFault(
        lambda a: {"grad_rows": a["grad_rows"][0]}, ValueError, (r"\bgrad_rows\b", "shape")
    ),
    "a row more than none": SparseFault(
        lambda a: {"indices": a["indices"][:0], "grad_rows": a["grad_rows"][:1]},
        ValueError,
        (r"\bgrad_rows\b", "shape"),
    ),
    **{
        f"{dtype} rows": SparseFault(
            lambda a, dtype=dtype: {"grad_rows": a["grad_rows"].astype(dtype)},  # type: ignore[misc]
            TypeError,
            (r"\bgrad_rows\b", "float32", "same_kind"),
        )
        for dtype in ("complex64", "object", "str")
    },
    "masked rows": SparseFault(
        lambda a: {"grad_rows": np.ma.masked_less(a["grad_rows"], 0)},
        TypeError,
        (r"\bgrad_rows\b", "mask"),
    ),
    "rows None": SparseFault(
        lambda _: {"grad_rows": None}, (TypeError, ValueError), (r"\bgrad_rows\b",)
    ),
    "rows text": SparseFault(lambda _: {"grad_rows": "rows"}, TypeError, (r"\bgrad_rows\b",)),
    "table without dimensions": SparseFault(
        lambda _: {"param": np.ones((), "float32")}, ValueError, (r"\bparam\b",)
    ),
    "another table's shape": SparseFault(
        lambda _: {"param": np.ones((7, 2), "float32")}, ValueError, (r"\bparam\b", r"\bbuild\b")
    ),
    "table None": SparseFault(lambda _: {"param": None}, TypeError, (r"\bparam\b",)),
    "table a list": SparseFault(
        lambda a: {"param": a["param"].tolist()}, TypeError, (r"\bparam\b",)
    ),
    "table Fortran": SparseFault(
        lambda a: {"param": np.asfortranarray(a["param"])}, ValueError, (r"\bparam\b", "C-contig")
    ),
    "table masked": SparseFault(
        lambda a: {"param": np.ma.array(a["param"])}, TypeError, (r"\bparam\b", "mask")
    ),
    "table strided": SparseFault(
        lambda a: {"param": strided(a["param"])}, ValueError, (r"\bparam\b", "gaps")
    ),
    "table misaligned": SparseFault(
        lambda a: {"param": misaligned(a["param"])}, ValueError, (r"\bparam\b", "align")
    ),
    "table read-only": SparseFault(
        lambda a: {"param": read_only(a["param"])}, ValueError, (r"\bparam\b", "(writ|read-only)")
    ),
}


class SparseTraining(Training):
    """A training of one table, after two steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(fresh=True, **options)
        rng = np.random.default_rng(3)
        self.params = [values(rng, (6, 2), "float32")]
        self.grads = [values(rng, (3, 2), "float32")]
        self.m, self.v = [np.zeros((6, 2), "float32")], [np.zeros((6, 2), "float32")]
        self.indices = np.array([4, 0, 4])
        for _ in range(2):
            self.apply()

    def apply(self, *, lazy: bool = True, **changes: Any) -> int:
        arguments: dict[str, Any] = {
            "indices": self.indices.copy(),
            "grad_rows": self.grads[0].copy(),
            "param": self.params[0],
        }
        return self.optimizer.apply_sparse(**{**arguments, **changes}, lazy=lazy)


def assert_sparse_refused(
    training: SparseTraining,
    twin: SparseTraining,
    call: Callable[[], object],
    error: Any,
    *parts: str,
) -> None:
    assert_refused(training, call, error, message(*parts))
    for t in (training, twin):
        t.apply()
        t.apply(lazy=False)
    assert_unchanged(training, twin.snapshot())


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])
@pytest.mark.parametrize("fault", SPARSE_FAULTS.values(), ids=SPARSE_FAULTS)
def test_sparse_call_that_is_refused(fault: SparseFault, lazy: bool) -> None:
    training, twin = SparseTraining(), SparseTraining()
    changes = fault.spoil(
        {
            "indices": training.indices,
            "grad_rows": training.grads[0].copy(),
            "param": training.params[0],
        }
    )
    assert_sparse_refused(
        training, twin, lambda: training.apply(lazy=lazy, **changes), fault.error, *fault.parts
    )
    if "param" not in changes:
        # The same for an optimizer that has no state yet.
        fresh = Adam()
        before = training.params[0].copy()
        arguments: dict[str, Any] = {
            "indices": training.indices,
            "grad_rows": training.grads[0],
            "param": training.params[0],
        }
        with pytest.raises(fault.error):
            fresh.apply_sparse(**{**arguments, **changes}, lazy=lazy)
        assert_same_bits(training.params[0], before)
        assert (fresh.iterations, fresh.weights) == (0, [])


def test_sparse_step_of_an_optimizer_of_several_parameters(training: Training) -> None:
    assert_refused(
        training,
        lambda: by_apply_sparse(training, training.params, training.grads),
        ValueError,
        message(r"\bapply_sparse\b", received=".*3.*"),
        twin=Training(),
    )


def test_sparse_step_of_an_optimizer_that_accumulates() -> None:
    p = np.ones((3, 2))
    adam = Adam(gradient_accumulation_steps=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)\bgradient_accumulation_steps\b"):
            adam.apply_sparse(np.array([0]), np.ones((1, 2)), p)
        np.testing.assert_array_equal(p, 1.0)
        assert adam.iterations == 0
        adam.build([p])


@pytest.mark.parametrize("lazy", [True, False, 1, 0])
def test_sparse_mode_is_a_keyword(lazy: Any) -> None:
    apply: Any = Adam().apply_sparse
    with pytest.raises(TypeError):
        apply(np.array([0]), np.ones((1, 2)), np.ones((3, 2)), lazy)


ZEROED_ROWS: dict[str, Callable[[Array], Any]] = {
    "strided": strided,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "a list": lambda a: a.tolist(),
    "float64": lambda a: a.astype("float64"),
    "swapped bytes": lambda a: a.astype(a.dtype.newbyteorder()),
}


@pytest.mark.parametrize("make", ZEROED_ROWS.values(), ids=ZEROED_ROWS)
def test_rows_that_cannot_be_zeroed_in_place(make: Callable[[Array], Any]) -> None:
    training, twin = (SparseTraining(zero_grad=True) for _ in range(2))
    rows = make(training.grads[0])
    assert_sparse_refused(
        training,
        twin,
        lambda: training.apply(grad_rows=rows),
        (TypeError, ValueError),
        r"\bgrad_rows\b",
    )
    np.testing.assert_array_equal(np.asarray(rows, "float32"), training.grads[0])


def test_rows_that_are_zeroed_and_belong_to_the_table() -> None:
    training, twin = (SparseTraining(zero_grad=True) for _ in range(2))
    for rows in (training.params[0][:3], training.optimizer.weights[1][:3]):
        assert_sparse_refused(
            training,
            twin,
            lambda rows=rows: training.apply(grad_rows=rows),  # type: ignore[misc]
            ValueError,
            r"\bgrad_rows\b",
            "(overlap|share)",
        )


@pytest.mark.parametrize(
    "step", [0, -1, -(2**63), 2**63, 2**64, HUGE], ids=lambda n: f"{float(min(n, 2**99)):.4g}"
)
def test_adam_step_count_out_of_range(training: Training, step: int) -> None:
    arrays = training.params, training.grads, training.m, training.v
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=step),
        ValueError,
        message(r"\bstep\b"),
        twin=Training(),
    )


@pytest.mark.parametrize(
    "step", [1.5, 1.0, "1", None, [1], float("nan"), 1j, *TRUTH_VALUES, np.array([1])], ids=repr
)
def test_adam_step_count_that_is_no_int(training: Training, step: Any) -> None:
    arrays = training.params, training.grads, training.m, training.v
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=step),
        TypeError,
        message(r"\bstep\b", "int"),
        twin=Training(),
    )


def test_adam_step_count_is_required(training: Training) -> None:
    arrays: list[Any] = [training.params, training.grads, training.m, training.v]
    without_step: Any = adam_step
    assert_refused(
        training, lambda: without_step(*arrays), TypeError, r".*\bstep\b.*", twin=Training()
    )


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("nesterov", None),
        ("name", None),
        ("Lr", "lr"),
        ("epsilon_", "epsilon"),
        ("clip_norm", "clipnorm"),
        ("beta1", "beta_1"),
        ("weight_decays", "weight_decay"),
        ("learning_rte", "learning_rate"),
    ],
)
def test_unknown_keyword(name: str, like: str | None) -> None:
    class Passing(Adam):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    options: dict[str, Any] = {name: 1.0}
    text = f"Unexpected keyword argument passed to optimizer: {name}"
    if like is not None:
        text += f". Did you mean '{like}'?"
    ways: list[Callable[[], object]] = [
        lambda: Adam(**options),
        lambda: Adam.from_config(Adam().get_config() | options),
        lambda: Passing(lr=0.5, **options),
        lambda: Passing.from_config(options),
    ]
    for way in ways:
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            way()


def test_unknown_keyword_of_adam_step(training: Training) -> None:
    arrays = training.params, training.grads, training.m, training.v
    options: dict[str, Any] = {"momentum": 0.9}
    assert_refused(
        training,
        lambda: adam_step(*arrays, step=1, **options),
        TypeError,
        ".*momentum.*",
        twin=Training(),
    )


@pytest.mark.parametrize("value", [0.001, 0.5])
def test_lr_and_its_synonym_at_once(value: float) -> None:
    # Refused even if the value is the default, because it was given.
    ways: list[tuple[tuple[float, ...], dict[str, Any]]] = [((0.001,), {}), ((), {"lr": 0.001})]
    for positional, named in ways:
        with pytest.raises(TypeError, match=r"(?s)\blr\b.*learning_rate|learning_rate.*\blr\b"):
            Adam(*positional, **named, learning_rate=value)


def test_iterations_cannot_be_assigned(training: Training) -> None:
    assert_refused(
        training,
        lambda: setattr(training.optimizer, "iterations", 7),
        AttributeError,
        ".*",
        twin=Training(),
    )


# -- weights ----------------------------------------------------------------------------------

LENGTH = (
    r"Length of the specified weight list \({}\) does not match "
    r"the number of weights of the optimizer \({}\).*"
)
SHAPE = r"Optimizer weight shape {} not compatible with provided weight shape {}.*"


def replaced(weights: list[Array], position: int, value: Any) -> list[Any]:
    changed: list[Any] = [w + 1 for w in weights]  # any partial copy would be visible
    changed[position] = value
    return changed


BAD_WEIGHTS: list[tuple[str, Callable[[list[Array]], Any], Any, str]] = [
    ("too few", lambda w: w[:-1], ValueError, LENGTH.format(6, 7)),
    ("too many", lambda w: [*w, w[1]], ValueError, LENGTH.format(8, 7)),
    ("none", lambda _: [], ValueError, LENGTH.format(0, 7)),
    ("only iterations", lambda w: w[:1], ValueError, LENGTH.format(1, 7)),
    (
        "3n+1, but the last ones are not of shape (1,)",
        lambda w: [*w, *w[-3:]],
        ValueError,
        f"({LENGTH.format(10, 7)}|{SHAPE.format('.*', '.*')})",
    ),
    (
        "last moment of another shape",
        lambda w: replaced(w, 6, np.ones(1, "float32")),
        ValueError,
        SHAPE.format(r"\(\)", r"\(1,\)"),
    ),
    (
        "moment of another shape",
        lambda w: replaced(w, 4, np.ones(4)),
        ValueError,
        SHAPE.format(r"\(3,\)", r"\(4,\)"),
    ),
    (
        "transposed",
        lambda w: replaced(w, 5, w[5].T),
        ValueError,
        SHAPE.format(r"\(4, 6\)", r"\(6, 4\)"),
    ),
    (
        "to be broadcast",
        lambda w: replaced(w, 5, w[5][:1]),
        ValueError,
        SHAPE.format(r"\(4, 6\)", r"\(1, 6\)"),
    ),
    (
        "iterations of another shape",
        lambda w: replaced(w, 0, np.array([5])),
        ValueError,
        SHAPE.format(r"\(\)", r"\(1,\)"),
    ),
    (
        "negative iterations",
        lambda w: replaced(w, 0, np.array(-1)),
        ValueError,
        message(r"weights\[0\]", "(>= 0|negative|from 0)"),
    ),
    (
        "iterations beyond int64",
        lambda w: replaced(w, 0, np.array(2**63, "uint64")),
        (TypeError, ValueError),
        message(r"weights\[0\]"),
    ),
    (
        "half an iteration",
        lambda w: replaced(w, 0, np.array(1.5)),
        (TypeError, ValueError),
        message(r"weights\[0\]"),
    ),
    (
        "NaN iterations",
        lambda w: replaced(w, 0, np.array(np.nan)),
        (TypeError, ValueError),
        message(r"weights\[0\]"),
    ),
    (
        "complex moment",
        lambda w: replaced(w, 5, w[5] + 1j),
        (TypeError, ValueError),
        message(r"weights\[5\]"),
    ),
    (
        "text for a moment",
        lambda w: replaced(w, 5, np.full((4, 6), "x")),
        (TypeError, ValueError),
        message(r"weights\[5\]"),
    ),
    (
        "masked moment",
        lambda w: replaced(w, 5, np.ma.masked_less(w[5], 0)),
        TypeError,
        message(r"weights\[5\]", "mask"),
    ),
    (
        "None for a moment",
        lambda w: replaced(w, 3, None),
        (TypeError, ValueError),
        f"({message(r'weights.3.')}|{SHAPE.format('.*', '.*')})",
    ),
    ("no sequence", lambda _: 7, TypeError, message(r"\bweights\b")),
    ("None", lambda _: None, TypeError, message(r"\bweights\b")),
]


@pytest.mark.parametrize(
    ("make", "error", "pattern"), [w[1:] for w in BAD_WEIGHTS], ids=[w[0] for w in BAD_WEIGHTS]
)
def test_weights_that_do_not_fit(
    training: Training, make: Callable[[list[Array]], Any], error: Any, pattern: str
) -> None:
    weights = make(training.optimizer.get_weights())
    assert_refused(
        training,
        lambda: training.optimizer.set_weights(weights),
        error,
        pattern,
        twin=Training(),
    )


def test_weights_before_there_are_any() -> None:
    training = Training(fresh=True)
    weights = Training().optimizer.get_weights()
    assert_refused(
        training,
        lambda: training.optimizer.set_weights(weights),
        ValueError,
        LENGTH.format(7, 0) + r"\bbuild\b.*",
    )
    training.optimizer.set_weights([])
    assert training.optimizer.weights == []
    assert_goes_on(training, Training(fresh=True))


# -- instruction sets and threads -------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "sse9", "AVX2 ", "auto", "baseline\0"], ids=repr)
def test_unknown_isa(training: Training, name: str) -> None:
    assert_refused(
        training,
        lambda: fusedadam.set_isa(name),
        ValueError,
        message(*fusedadam.supported_isas()),
        twin=Training(),
    )


def test_isa_of_another_architecture(training: Training) -> None:
    foreign = {"baseline", "avx2", "avx512", "neon"} - set(fusedadam.supported_isas())
    assert foreign, "no machine has both AVX2 and NEON"
    for name in foreign:
        assert_refused(
            training,
            lambda name=name: fusedadam.set_isa(name),  # type: ignore[misc]
            ValueError,
            message(*fusedadam.supported_isas(), received=f".*{name}.*"),
        )


@pytest.mark.parametrize("name", [None, 2, b"baseline", ["baseline"]], ids=repr)
def test_isa_that_is_no_text(training: Training, name: Any) -> None:
    assert_refused(training, lambda: fusedadam.set_isa(name), TypeError, r"(?s).+", twin=Training())


@pytest.mark.parametrize("name", ["sse9", "AVX9", "foreign"])
def test_unknown_forced_isa_stops_the_import(name: str) -> None:
    if name == "foreign":
        name = "avx2" if "neon" in fusedadam.supported_isas() else "neon"
    code = """
        try:
            import fusedadam
        except ImportError as error:
            print(error)
        else:
            print("imported")
    """
    done = run_python(code, environment={"FUSEDADAM_ISA": name})
    assert done.returncode == 0, done.stderr
    expected = message("FUSEDADAM_ISA", *fusedadam.supported_isas(), received=f".*{name}.*")
    assert re.fullmatch(expected, done.stdout.strip(), re.DOTALL), done.stdout


@pytest.mark.parametrize("n", [0, -1, -(2**31), 4097, 2**32 + 1])
def test_thread_count_out_of_range(training: Training, n: int) -> None:
    assert_refused(
        training,
        lambda: fusedadam.set_num_threads(n),
        ValueError,
        message(r"\b(n|num_threads|threads)\b", "(>= 1|at least 1)", received=f".*{n}.*"),
        twin=Training(),
    )


@pytest.mark.parametrize(
    "n", [2**64 + 1, -(2**64), HUGE], ids=lambda n: f"{float(min(n, 2**99)):.4g}"
)
def test_thread_count_beyond_64_bits(training: Training, n: int) -> None:
    assert_refused(
        training,
        lambda: fusedadam.set_num_threads(n),
        (TypeError, ValueError),
        r"(?s).+",
        twin=Training(),
    )


@pytest.mark.parametrize("n", [1.5, 2.0, "2", None, [2], *TRUTH_VALUES], ids=repr)
def test_thread_count_that_is_no_int(training: Training, n: Any) -> None:
    assert_refused(
        training,
        lambda: fusedadam.set_num_threads(n),
        TypeError,
        message(r"\b(n|num_threads|threads)\b", "int"),
        twin=Training(),
    )


# -- text that UTF-8 cannot encode ---------------------------------------------------------------


SURROGATE: Any = "\ud800"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: Adam(loss_scale=SURROGATE), ValueError, "loss_scale must be"),
        (
            lambda: Adam(**dict[str, Any]({SURROGATE: 1})),
            TypeError,
            r"Unexpected keyword .*\\ud800",
        ),
        (lambda: fusedadam.set_isa(SURROGATE), ValueError, r"\\ud800"),
    ],
    ids=["value", "name", "isa"],
)
def test_lone_surrogate(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
