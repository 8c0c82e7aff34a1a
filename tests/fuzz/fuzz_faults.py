# SPDX-License-Identifier: MIT
"""Calls with one fault each: the call, and the errors that may report it.

All other arguments are valid, so a fault that goes unnoticed leads to a step.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import autograd.numpy as anp
import fusedadam
import numpy as np
from fusedadam import Adam
from fuzz_model import Model, Parameters
from helpers import Array, misaligned, read_only
from oracle import LARGEST_COUNT


class Program(Protocol):
    """What a fault needs to know about the program in which it happens."""

    adam: Adam
    model: Model
    params: Parameters
    rng: np.random.Generator
    folder: Path

    def gradients(self) -> list[Array]:
        """Fresh gradients that fit the parameters."""


class Refused(NamedTuple):
    call: Callable[[], object]
    errors: tuple[type[BaseException], ...] = (TypeError, ValueError)


class CallersError(Exception):
    """Raised by an object of the caller."""


Fault = Callable[[Program], "Refused | None"]


def _position(program: Program, min_size: int = 0) -> int | None:
    """Return the position of any parameter with at least this many elements."""
    fitting = [i for i, a in enumerate(program.params.arrays) if a.size >= min_size]
    return int(program.rng.choice(fitting)) if fitting else None


# -- a bad array ------------------------------------------------------------------------------


def _cast(dtype: str) -> Callable[[Array], Array]:
    @np.errstate(all="ignore")
    def cast(a: Array) -> Array:
        return a.astype(dtype)

    return cast


def _other_dtype(a: Array) -> Array:
    return _cast("float32" if a.dtype == np.float64 else "float64")(a)


def _strided(a: Array) -> Array:
    view: Array = np.repeat(a, 2).reshape(*a.shape, 2)[..., 0]
    return view


def _swapped(a: Array) -> Array:
    return a.view(a.dtype.newbyteorder())


def _longer(a: Array) -> Array:
    return np.concatenate([a, a[:1]])


def _masked(a: Array) -> Array:
    masked: Array = np.ma.array(a.copy())
    return masked


BAD_PARAMS: Final[dict[str, Callable[[Array], Any]]] = {
    "masked": _masked,
    "complex": _cast("complex64"),
    "None": lambda _: None,
    "a list": lambda a: a.tolist(),
    "int16": _cast("int16"),
    "int32": lambda a: np.ones(a.shape, "int32"),
    "swapped bytes": _swapped,
    "read-only": read_only,
    "misaligned": misaligned,
    "strided": _strided,
    "another dtype": _other_dtype,
    "longer": _longer,
    "another rank": lambda a: a[None].copy(),
}
BAD_GRADIENTS: Final[dict[str, Callable[[Array], Any]]] = {
    "text": lambda _: "gradient",
    "an array of text": lambda a: np.full(a.shape, "1"),
    "an array of objects": lambda a: a.astype(object),
    "an array of durations": lambda a: np.ones(a.shape, "timedelta64[s]"),
    "complex": _cast("complex64"),
    "masked": _masked,
    "longer": _longer,
    "another rank": lambda a: a[None],
    "a ragged list": lambda _: [[1.0], [1.0, 2.0]],
    "no array": lambda _: object(),
}
# Not an array, or of another dtype: cannot be zeroed.
BAD_GRADIENTS_TO_ZERO: Final[dict[str, Callable[[Array], Any]]] = {
    "swapped bytes": _swapped,
    "another dtype": _other_dtype,
    "a list": lambda a: a.tolist(),
    "strided": _strided,
    "read-only": read_only,
}
ROUTES: Final[dict[str, Callable[[Adam, list[Any], list[Any]], object]]] = {
    "apply_gradients": lambda adam, g, p: adam.apply_gradients(list(zip(g, p, strict=True))),
    "apply_gradients of an iterator": lambda adam, g, p: adam.apply_gradients(
        zip(g, p, strict=True)
    ),
    "apply_gradients of lists": lambda adam, g, p: adam.apply_gradients(
        [[*pair] for pair in zip(g, p, strict=True)]  # type: ignore[misc]
    ),
    "get_updates": lambda adam, g, p: adam.get_updates(g, p),
}


def _step(program: Program, grads: list[Any], params: list[Any]) -> Refused:
    route = ROUTES[str(program.rng.choice(list(ROUTES)))]
    return Refused(lambda: route(program.adam, grads, params))


def _bad_param(make: Callable[[Array], Any]) -> Fault:
    def fault(program: Program) -> Refused | None:
        i = _position(program, 2)  # an array of one element fits any layout
        if i is None:
            return None
        params: list[Any] = list(program.params.arrays)
        params[i] = make(params[i])
        if not program.model.is_built and isinstance(params[i], np.ndarray):
            try:
                Adam().build(params)
            except (TypeError, ValueError):
                pass
            else:
                return None  # without moments, this is no fault
        return _step(program, program.gradients(), params)

    return fault


def _bad_gradient(make: Callable[[Array], Any]) -> Fault:
    def fault(program: Program) -> Refused | None:
        i = _position(program, 1)
        if i is None or program.params.arrays[i].ndim == 0:
            return None
        grads: list[Any] = list(program.gradients())
        grads[i] = make(grads[i])
        return _step(program, grads, list(program.params.arrays))

    return fault


def _bad_gradient_to_zero(make: Callable[[Array], Any]) -> Fault:
    def fault(program: Program) -> Refused | None:
        i = _position(program, 2)
        if i is None or not program.model.oracle.zero_grad:
            return None
        grads: list[Any] = list(program.gradients())
        grads[i] = make(grads[i])
        return _step(program, grads, list(program.params.arrays))

    return fault


def _no_gradient(program: Program) -> Refused | None:
    i = _position(program)
    if i is None:
        return None
    grads: list[Any] = list(program.gradients())
    grads[i] = None
    return Refused(lambda: program.adam.get_updates(grads, program.params.arrays), (ValueError,))


def _no_gradients(program: Program) -> Refused | None:
    pairs = [(None, array) for array in program.params.arrays]
    return Refused(lambda: program.adam.apply_gradients(pairs), (ValueError,)) if pairs else None


def _wrong_way_round(program: Program) -> Refused | None:
    if _position(program, 1) is None or program.model.bound is not program.params:
        return None
    return Refused(
        lambda: program.adam.apply_gradients(
            zip(program.params.arrays, program.gradients(), strict=True)
        ),
        (ValueError,),
    )


def _another_order(program: Program) -> Refused | None:
    """The parameters of the last step with two of them swapped."""
    filled = [i for i, a in enumerate(program.params.arrays) if a.size]
    if len(filled) < 2 or program.model.bound is not program.params:
        return None
    order = list(range(len(program.params.arrays)))
    i, j = (int(k) for k in program.rng.choice(filled, 2, replace=False))
    order[i], order[j] = j, i
    grads = program.gradients()
    return _step(program, [grads[k] for k in order], [program.params.arrays[k] for k in order])


def _gradient_of_other_parameters(program: Program) -> Refused | None:
    """Valid parameters in another layout, not seen before, with a bad gradient."""
    i = _position(program, 1)
    if i is None:
        return None
    twins = [a.copy("F" if a.flags.c_contiguous else "C") for a in program.params.arrays]
    grads: list[Any] = list(program.gradients())
    grads[i] = grads[i][..., None]
    return _step(program, grads, twins)


def _overlapping_params(program: Program) -> Refused | None:
    arrays = program.params.arrays
    for i, a in enumerate(arrays):
        for j in range(i):
            if a.size and a.shape == arrays[j].shape and a.dtype == arrays[j].dtype:
                params = list(arrays)
                params[i] = arrays[j]
                return _step(program, program.gradients(), params)
    return None


def _overlapping_twins(program: Program) -> Refused | None:
    """Parameters in another layout, two of which share memory."""
    i = _position(program, 1)
    if i is None or not program.model.is_built:
        return None
    arrays = program.params.arrays
    twins = [a.copy("F" if a.flags.c_contiguous else "C") for a in arrays]
    for j, array in enumerate(arrays):
        if j != i and (array.shape, array.dtype) == (arrays[i].shape, arrays[i].dtype):
            twins[j] = twins[i]
            return _step(program, program.gradients(), twins)
    return None


def _a_moment_as_parameter(program: Program) -> Refused | None:
    i = _position(program, 1)
    if i is None or not program.model.is_built:
        return None
    params = list(program.params.arrays)
    params[i] = program.adam.weights[1 + i]
    return _step(program, program.gradients(), params)


def _parameter_as_gradient_to_zero(program: Program) -> Refused | None:
    i = _position(program, 1)
    if i is None or not program.model.oracle.zero_grad:
        return None
    grads = program.gradients()
    grads[i] = program.params.arrays[i]
    return _step(program, grads, program.params.arrays)


def _one_gradient_missing(program: Program) -> Refused | None:
    if not program.params.arrays:
        return None
    return Refused(
        lambda: program.adam.get_updates(program.gradients()[:-1], program.params.arrays)
    )


def _one_parameter_more(program: Program) -> Refused | None:
    if not program.model.is_built:
        return None
    return _step(program, [*program.gradients(), np.ones(2)], [*program.params.arrays, np.ones(2)])


def _bad_build(program: Program) -> Refused | None:
    i = _position(program, 1)
    if i is None:
        return None
    params = list(program.params.arrays)
    params[i] = read_only(params[i])
    return Refused(lambda: program.adam.build(params), (ValueError,))


def _parameter_read_only_since(program: Program) -> Refused | None:
    i = _position(program, 1)
    if i is None:
        return None
    array = program.params.arrays[i]

    def call() -> None:
        array.flags.writeable = False
        try:
            ROUTES["apply_gradients"](program.adam, program.gradients(), program.params.arrays)
        finally:
            array.flags.writeable = True

    return Refused(call, (ValueError,))


def _swap_of_what_is_read_only(program: Program) -> Refused | None:
    bound = program.model.bound
    i = next((i for i, a in enumerate(bound.arrays) if a.size), None) if bound else None
    if bound is None or i is None or not program.model.oracle.use_ema:
        return None
    array = bound.arrays[i]

    def call() -> None:
        array.flags.writeable = False
        try:
            program.adam.swap_ema()
        finally:
            array.flags.writeable = True

    return Refused(call, (ValueError,))


# -- losses, schedules and iterators that raise -----------------------------------------------


def _raising(*_: Any) -> Any:
    raise CallersError


def _loss(loss: Any, *errors: type[BaseException]) -> Fault:
    def fault(program: Program) -> Refused | None:
        if not program.params.arrays or not program.params.arrays[0].size:
            return None
        return Refused(lambda: program.adam.get_updates(loss, program.params.arrays), errors)

    return fault


def _iterator_that_raises(program: Program) -> Refused:
    def pairs() -> Iterator[tuple[Array, Array]]:
        yield from list(zip(program.gradients(), program.params.arrays, strict=True))[:1]
        raise CallersError

    return Refused(lambda: program.adam.apply_gradients(pairs()), (CallersError,))


def _schedule(schedule: Callable[[int], Any], *errors: type[BaseException]) -> Fault:
    def fault(program: Program) -> Refused:
        def call() -> None:
            lr = program.adam.lr
            program.adam.lr = schedule
            try:
                ROUTES["apply_gradients"](program.adam, program.gradients(), program.params.arrays)
            finally:
                program.adam.lr = lr

        return Refused(call, errors)

    return fault


# -- weights ----------------------------------------------------------------------------------


def _weights(change: Callable[[list[Array]], Any]) -> Fault:
    def fault(program: Program) -> Refused | None:
        if not program.model.is_built:
            return None
        weights = program.adam.get_weights()
        try:
            changed = change(weights)
        except IndexError:
            return None
        return Refused(lambda: program.adam.set_weights(changed))

    return fault


def _with(weights: list[Array], position: int, value: Any) -> list[Any]:
    weights[position]  # raises if there is none
    # The values differ from the current ones, and only the one at `position` is bad. A count may be
    # the largest.
    changed: list[Any] = [np.where(w == LARGEST_COUNT, w, w + 1) for w in weights]
    changed[position] = value
    return changed


def _overflow_as_error(program: Program) -> Refused | None:
    """Values too large for float32 in the last moment, while the caller makes overflow an error."""
    if not program.model.is_built or len(program.adam.weights) < 2:
        return None
    weights = program.adam.get_weights()
    if weights[-1].dtype != np.float32 or not weights[-1].size:
        return None
    changed = _with(weights, -1, np.full(weights[-1].shape, 1e300))

    def call() -> None:
        with np.errstate(all="ignore", over="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            program.adam.set_weights(changed)

    return Refused(call, (FloatingPointError, RuntimeWarning))


# -- rows -------------------------------------------------------------------------------------


def _rows(make: Callable[[Array], tuple[Any, Any, Any]]) -> Fault:
    def fault(program: Program) -> Refused | None:
        if len(program.params.arrays) != 1:
            return None
        (table,) = program.params.arrays
        if table.ndim == 0 or not table.size:
            return None
        arguments = make(table)
        return Refused(lambda: program.adam.apply_sparse(*arguments))

    return fault


def _rows_in_fortran_order(program: Program) -> Refused | None:
    if len(program.params.arrays) != 1:
        return None
    table = np.asfortranarray(program.params.arrays[0].copy())
    if table.flags.c_contiguous or not table.size:
        return None
    return Refused(lambda: program.adam.apply_sparse(np.array([0]), table[:1].copy(), table))


def _rows_of_several(program: Program) -> Refused | None:
    arrays = program.params.arrays
    if len(arrays) < 2 or not program.model.is_built or not arrays[0].ndim:
        return None
    return Refused(lambda: program.adam.apply_sparse(np.array([0]), arrays[0][:1], arrays[0]))


def _rows_while_accumulating(program: Program) -> Refused | None:
    arrays = program.params.arrays
    if (program.model.oracle.gradient_accumulation_steps or 1) == 1 or len(arrays) != 1:
        return None
    if arrays[0].ndim == 0:
        return None
    return Refused(
        lambda: program.adam.apply_sparse(np.zeros(0, "int64"), arrays[0][:0], arrays[0])
    )


# -- files and the rest -----------------------------------------------------------------------


def _save_to_nowhere(program: Program) -> Refused | None:
    path = program.folder / "missing" / "adam"
    return Refused(lambda: program.adam.save(path), (OSError, ValueError))


def _truncated_file(program: Program) -> Refused | None:
    path = program.folder / "whole"
    if path.exists():
        path.unlink()
    try:
        program.adam.save(path)
    except ValueError:
        return None
    data = path.read_bytes()
    cut = program.folder / "cut"
    cut.write_bytes(data[: int(program.rng.integers(len(data)))])
    return Refused(lambda: Adam.load(cut, program.params.arrays, lr=0.5), (ValueError,))


def _file_of_other_parameters(program: Program) -> Refused | None:
    if not program.model.is_built or not program.params.arrays:
        return None
    path = program.folder / "whole"
    try:
        program.adam.save(path)
    except ValueError:
        return None
    params = program.params.arrays[:-1]
    return Refused(lambda: Adam.load(path, params, lr=0.5), (ValueError,))


def _excluding(value: Any) -> Fault:
    return lambda program: Refused(
        lambda: program.adam.exclude_from_weight_decay(value), (TypeError,)
    )


def _overriding(error: type[Exception], **settings: Any) -> Fault:
    return lambda program: Refused(
        lambda: program.adam.override(program.params.arrays, **settings), (error,)
    )


def _nested_otherwise(program: Program) -> Refused | None:
    """Gradients nested in another way than the parameters."""
    if not program.params.arrays:
        return None
    return Refused(
        lambda: program.adam.step(program.params.arrays, {"p0": program.gradients()[0]}),
        (TypeError, ValueError),
    )


def _load_into_what_is_swapped(program: Program) -> Refused | None:
    if not program.model.is_swapped:
        return None
    path = program.folder / "whole"
    Adam().save(path)
    return Refused(lambda: program.adam.load(path, program.params.arrays), (ValueError,))


def _copy_while_swapped(program: Program) -> Refused | None:
    if not program.model.is_swapped:
        return None
    copiers: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, pickle.dumps]
    copier = copiers[int(program.rng.integers(3))]
    return Refused(lambda: copier(program.adam), (ValueError,))


FAULTS: Final[dict[str, Fault]] = {
    **{f"param: {name}": _bad_param(make) for name, make in BAD_PARAMS.items()},
    **{f"grad: {name}": _bad_gradient(make) for name, make in BAD_GRADIENTS.items()},
    **{
        f"grad to zero: {name}": _bad_gradient_to_zero(b)
        for name, b in BAD_GRADIENTS_TO_ZERO.items()
    },
    "grad: None": _no_gradient,
    "grads: all None": _no_gradients,
    "pairs the wrong way round": _wrong_way_round,
    "params in another order": _another_order,
    "params in another layout that overlap": _overlapping_twins,
    "nested otherwise": _nested_otherwise,
    "overriding the step": _overriding(ValueError, loss_scale=2.0),
    "overriding the moments": _overriding(ValueError, moments="bfloat16"),
    "overriding the low bits": _overriding(ValueError, low_bits=None),
    "overriding by a schedule": _overriding(TypeError, lr=lambda _: 0.1),
    "overriding an unknown one": _overriding(TypeError, momentum=0.1),
    "overriding out of range": _overriding(ValueError, beta_1=1.0),
    "overriding by a truth value": _overriding(TypeError, lr=True),
    "overriding by text": _overriding(TypeError, weight_decay="0.1"),
    "loading into what is swapped": _load_into_what_is_swapped,
    "grad of other params": _gradient_of_other_parameters,
    "params that overlap": _overlapping_params,
    "a moment as param": _a_moment_as_parameter,
    "a param as grad to zero": _parameter_as_gradient_to_zero,
    "one grad missing": _one_gradient_missing,
    "one param more": _one_parameter_more,
    "bad build": _bad_build,
    "param read-only since": _parameter_read_only_since,
    "swap of what is read-only": _swap_of_what_is_read_only,
    "loss raises": _loss(_raising, CallersError, ValueError),
    "loss is no scalar": _loss(lambda p: anp.ones(2) * anp.sum(p[0]), TypeError, ValueError),
    "loss is a number": _loss(0.5, TypeError),
    "loss is text": _loss("loss", TypeError),
    "loss of nothing": _loss(lambda p: anp.sum(p[99]), IndexError, ValueError),
    "iterator raises": _iterator_that_raises,
    "schedule raises": _schedule(_raising, CallersError, ValueError),
    "schedule gives NaN": _schedule(lambda _: float("nan"), ValueError),
    "schedule gives -1": _schedule(lambda _: -1.0, ValueError),
    "schedule gives text": _schedule(lambda _: "fast", TypeError, ValueError),
    "weights: too few": _weights(lambda w: w[:-1]),
    "weights: too many": _weights(lambda w: [*w, *w, *w]),
    "weights: no list": _weights(lambda _: 3.0),
    "weights: shape": _weights(lambda w: _with(w, -1, w[-1][None])),
    "weights: complex": _weights(lambda w: _with(w, 1, w[1] + 1j)),
    "weights: text": _weights(lambda w: _with(w, 1, "weights")),
    "weights: None": _weights(lambda w: _with(w, 1, None)),
    "weights: NaN steps": _weights(lambda w: _with(w, 0, float("nan"))),
    "weights: -1 steps": _weights(lambda w: _with(w, 0, -1)),
    "weights: half a step": _weights(lambda w: _with(w, 0, 0.5)),
    "weights: too many steps": _weights(lambda w: _with(w, 0, 2**53 + 1)),
    "weights: overflow as an error": _overflow_as_error,
    "rows: beyond": _rows(lambda t: (np.array([len(t)]), t[:1].copy(), t)),
    "rows: -1": _rows(lambda t: (np.array([0, -1]), t[[0, 0]], t)),
    "rows: float indices": _rows(lambda t: (np.array([0.0]), t[:1].copy(), t)),
    "rows: int16 indices": _rows(lambda t: (np.array([0], "int16"), t[:1].copy(), t)),
    "rows: indices of two axes": _rows(lambda t: (np.array([[0]]), t[:1].copy(), t)),
    "rows: one missing": _rows(lambda t: (np.array([0, 0]), t[:1].copy(), t)),
    "rows: complex": _rows(lambda t: (np.array([0]), t[:1] + 1j, t)),
    "rows: masked": _rows(lambda t: (np.array([0]), _masked(t[:1]), t)),
    "rows: no list": _rows(lambda t: (np.array([0]), "rows", t)),
    "rows: Fortran order": _rows_in_fortran_order,
    "rows: read-only table": _rows(lambda t: (np.array([0]), t[:1].copy(), read_only(t))),
    "rows: no table": _rows(lambda t: (np.array([0]), t[:1].copy(), t.tolist())),
    "rows: of several": _rows_of_several,
    "rows: while accumulating": _rows_while_accumulating,
    "save to nowhere": _save_to_nowhere,
    "truncated file": _truncated_file,
    "file of other params": _file_of_other_parameters,
    "excluding text": _excluding("bias"),
    "excluding a number": _excluding([0]),
    "copy while swapped": _copy_while_swapped,
    "unknown isa": lambda _: Refused(lambda: fusedadam.set_isa("mmx"), (ValueError,)),
    "no threads": lambda _: Refused(lambda: fusedadam.set_num_threads(0), (ValueError,)),
    "-1 threads": lambda _: Refused(lambda: fusedadam.set_num_threads(-1), (ValueError,)),
    "threads of text": lambda _: Refused(
        lambda: fusedadam.set_num_threads("2"),  # type: ignore[arg-type]
        (TypeError,),
    ),
}
