# SPDX-License-Identifier: MIT
"""Lists of weights, and detection of the library that saved one.

The layouts (`vhat` with `amsgrad`, averages with `use_ema`), and the dtypes of their counts:

- `m..., v...`, no count: Keras 1.0.0 to 1.0.5.
- `iterations, m..., v...`, float32: Keras 1.0.8 to 2.0.7.
- `iterations, m..., v...(, vhat...)`, int64: this package, TensorFlow 1.4 to 2.10, Keras from 2.0.9
  on, and `optimizers.legacy` of tf_keras.
- `iterations, m..., v...`, then a zero of shape (1,) per parameter, int64: Keras 2.1.3 to 2.15
  without amsgrad, if it has `get_updates`.
- `iteration, learning_rate(, average...), m0, v0, m1, v1, ...(, vhat...)`, int32, or int64 on
  TensorFlow: Keras 3.
- The same without `learning_rate`: Keras 3 with a schedule, and tf_keras from 2.11 on.

As in Keras, a list needs an optimizer with the same `amsgrad` and, if it holds averages, with
`use_ema`. Keras 3 with `gradient_accumulation_steps` puts its accumulators after the averages; such
a list is refused, because it counts calls instead of steps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fusedadam._core import (
    AdamState,
    join_weights,
    max_iterations,
    pack_moments,
    split_weights,
    unpack_moments,
)
from fusedadam.arrays import Array, as_array, listed, parameter_arrays

# The layouts, described for the error message about an ambiguous list.
LAYOUTS = {
    "fusedadam": "[iterations, m0, m1, ..., v0, v1, ...]: this package",
    "keras-2": "[iterations, m0, m1, ..., v0, v1, ...]: TensorFlow 1.4, Keras 1 and 2",
    "keras-3": "[iteration, learning_rate, m0, v0, m1, v1, ...]: Keras 3",
    "keras-3-schedule": "[iteration, m0, v0, m1, v1, ...]: Keras 3 with a schedule, tf_keras from "
    "2.11 on",
}
_GROUPED = ("fusedadam", "keras-2")

# The role of an array in a list: its kind and the index of its parameter.
_Place: TypeAlias = tuple[str, int]
_Form: TypeAlias = list[_Place]
_ITERATIONS, _LEARNING_RATE = ("iterations", 0), ("learning_rate", 0)


class Weights(list[Array]):
    """A list from `get_weights`; its type tells `set_weights` its layout."""


def moments_of(state: AdamState) -> list[list[Array]]:
    """Return the live moments by kind; as in Keras up to 2.10, without averages or accumulators."""
    slots = state.slots or {}
    return [slots[kind] for kind in ("packed", "m", "v", "vhat") if kind in slots]


def weights_of(state: AdamState) -> list[Array]:
    """Return the count and the live moments; an empty list before the state is built."""
    if not state.is_built:
        return []
    return Weights([count_array(state), *(array for kind in moments_of(state) for array in kind)])


def copied_weights(state: AdamState) -> list[Array]:
    """Return copies of the count and the moments, those of 16 bits as float32."""
    if not state.is_built:
        return Weights()
    slots = state.slots
    if "packed" in slots:
        pairs = list(map(unpack_moments, slots["packed"]))
        kinds = [[pair[k] for pair in pairs] for k in range(2)]
    else:
        kinds = [list(map(_copy_of_values, kind)) for kind in moments_of(state)]
    return Weights([count_array(state).copy(), *(array for kind in kinds for array in kind)])


def _copy_of_values(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array.copy()


def stored(
    arrays: Mapping[tuple[str, int], Array], slots: Mapping[str, Sequence[Array]]
) -> list[tuple[Array, Array]]:
    """Return pairs of a live array and its new contents, for arrays by kind and position."""
    pairs = []
    for (kind, i), new in arrays.items():
        if kind in slots:
            live = slots[kind][i]
            # Convert before writing, since an overflow raises if warnings are errors. Copy views,
            # which may share memory with the moments.
            pairs.append((live, new.astype(live.dtype, copy=not new.flags.owndata)))
        elif kind == "m":
            live = slots["packed"][i]
            words = np.empty_like(live)
            m, v = (np.empty_like(live, np.float32) for _ in range(2))
            m[...], v[...] = new, arrays["v", i]
            pack_moments(m, v, words)
            pairs.append((live, words))
    return pairs


def count_array(state: AdamState) -> Array:
    """Return the number of steps taken as a read-only 0-d array."""
    array = np.array(state.iterations, dtype=np.int64)
    array.flags.writeable = False
    return array


class _Reading(NamedTuple):
    """A list of weights, read in one layout."""

    layout: str
    arrays: dict[_Place, Array]


class TakenWeights(NamedTuple):
    """The contents of a list of weights; `arrays` has pairs of a live array and its new contents."""

    iterations: int
    learning_rate: float | None
    arrays: list[tuple[Array, Array]]


def taken_weights(
    weights: Iterable[Any], slots: Mapping[str, Sequence[Array]] | None, layout: str | None
) -> TakenWeights | None:
    """Read a list of weights in one of `LAYOUTS`, or detect its layout if None.

    `slots` has the live arrays by kind, or is None before the state is built; an empty list is then
    valid, and the result is None.
    """
    if layout is not None and layout not in tuple(LAYOUTS):
        raise ValueError(
            f"layout must be None or one of {', '.join(map(repr, LAYOUTS))}. Received: {layout!r}"
        )
    given = [_real_array(w, i) for i, w in enumerate(listed(weights, "weights"))]
    if slots is None:
        if given:
            raise _length_error(given, 0, "; build(params) creates them")
        return None
    # Packed moments have the shapes of m and v.
    shown = slots if "m" in slots else {**slots, **dict.fromkeys(("m", "v"), slots["packed"])}
    reading = _reading(given, shown, layout, own=isinstance(weights, Weights))
    rate = reading.arrays.get(_LEARNING_RATE)
    return TakenWeights(
        _step_count(reading.arrays[_ITERATIONS]),
        # The shortest decimal: 0.001 for float32's 0.0010000000474974513.
        None if rate is None else float(str(rate[()])),
        stored(reading.arrays, slots),
    )


def _reading(
    given: list[Array], slots: Mapping[str, Sequence[Array]], layout: str | None, *, own: bool
) -> _Reading:
    shapes = [w.shape for w in slots["m"]]
    forms = [
        (name, form)
        for name, form in _forms(len(shapes), vhat="vhat" in slots, ema="ema" in slots)
        if (name == "fusedadam" if own and layout is None else layout in (None, name))
    ]
    readings = _distinct(
        _Reading(name, dict(zip(form, given, strict=True)))
        for name, form in forms
        if _fits(given, form, shapes)
    )
    if not readings:
        raise _misfit(given, [form for _, form in forms], slots, layout)
    if len(readings) > 1 or layout is not None:
        readings = _without_contradictions(readings, own=own)
    if len(readings) > 1:
        readings = _by_count(given[0].dtype, readings)
    if len(readings) > 1:
        names = dict.fromkeys(reading.layout for reading in readings)
        choices = ", or ".join(f'layout="{name}" ({LAYOUTS[name]})' for name in names)
        raise ValueError(
            "weights could be a list of more than one layout: pass the one that it was saved in, "
            f"{choices}. Received: layout=None"
        )
    return readings[0]


def _forms(count: int, *, vhat: bool, ema: bool) -> Iterator[tuple[str, _Form]]:
    """Yield each possible form of a list for this number of parameters, this package's first."""
    each = range(count)
    last = [("vhat", i) for i in each if vhat]
    grouped = [_ITERATIONS, *(("m", i) for i in each), *(("v", i) for i in each), *last]
    for layout in _GROUPED:
        yield layout, grouped
    if not vhat:
        yield "keras-2", [*grouped, *(("placeholder", i) for i in each)]
    for layout, rate in (("keras-3", [_LEARNING_RATE]), ("keras-3-schedule", [])):
        for extra in ((), ("ema",)) if ema else ((),):
            yield layout, _interleaved(count, rate, extra, last)


def _interleaved(count: int, rate: _Form, extra: Iterable[str], last: _Form) -> _Form:
    each = range(count)
    pairs = [(kind, i) for i in each for kind in ("m", "v")]
    return [_ITERATIONS, *rate, *((kind, i) for kind in extra for i in each), *pairs, *last]


def _shape(place: _Place, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if place in (_ITERATIONS, _LEARNING_RATE):
        return ()
    kind, i = place
    return (1,) if kind == "placeholder" else shapes[i]


def _fits(given: list[Array], form: _Form, shapes: Sequence[tuple[int, ...]]) -> bool:
    return _may_be(given, form) and all(
        w.shape == _shape(place, shapes) for w, place in zip(given, form, strict=True)
    )


def _may_be(given: list[Array], form: _Form) -> bool:
    """Whether the length, the learning rate and the placeholders fit; other shapes may not."""
    return len(given) == len(form) and all(
        w.shape == () if kind == "learning_rate" else w.shape == (1,) and not w.any()
        for w, (kind, _) in zip(given, form, strict=True)
        if kind in ("learning_rate", "placeholder")
    )


def _distinct(readings: Iterable[_Reading]) -> list[_Reading]:
    """Return the readings without those that equal an earlier one in all values."""
    kept: list[_Reading] = []
    for reading in readings:
        if not any(_same(reading.arrays, other.arrays) for other in kept):
            kept.append(reading)
    return kept


def _same(a: dict[_Place, Array], b: dict[_Place, Array]) -> bool:
    return a.keys() == b.keys() and all(
        w is b[place]
        or (
            np.array_equal(w, b[place], equal_nan=True)
            and np.array_equal(np.signbit(w), np.signbit(b[place]))
        )
        for place, w in a.items()
    )


def _without_contradictions(readings: list[_Reading], *, own: bool) -> list[_Reading]:
    contradictions = [_contradiction(reading, own=own) for reading in readings]
    if all(contradictions):
        reasons = "; ".join(
            f'not "{reading.layout}": {reason}'
            for reading, reason in zip(readings, contradictions, strict=True)
        )
        raise ValueError(f"weights must be in a layout that they can have. Received: {reasons}")
    return [r for r, reason in zip(readings, contradictions, strict=True) if not reason]


def _contradiction(reading: _Reading, *, own: bool) -> str | None:
    """Return why the list cannot be in this layout, or None; v and vhat are never negative."""
    if own and reading.layout not in _GROUPED:
        return "the list is of get_weights"
    for (kind, i), w in reading.arrays.items():
        if kind == "learning_rate" and not 0 <= w < math.inf:
            return f"a learning rate of {w}"
        # The sign bit of a NaN is arbitrary.
        if kind in ("v", "vhat") and np.any(np.signbit(w) & ~np.isnan(w)):
            return f"{kind} of params[{i}] would be negative"
        if kind == "vhat" and np.any(w < reading.arrays["v", i]):
            return f"vhat of params[{i}] would be less than its v"
    return None


def _by_count(dtype: np.dtype[Any], readings: list[_Reading]) -> list[_Reading]:
    """Return the readings whose layouts save a count of this dtype; all if there are none."""
    if dtype.kind == "f":
        left = [r for r in readings if r.layout in _GROUPED]
    # With NumPy 1 on Windows, int32 is the default integer and does not tell the layout.
    elif dtype == np.int32 != np.array(0).dtype:
        left = [r for r in readings if r.layout not in _GROUPED]
    else:
        return readings
    return left or readings


def _misfit(
    given: list[Array],
    forms: list[_Form],
    slots: Mapping[str, Sequence[Array]],
    layout: str | None,
) -> ValueError:
    shapes = [w.shape for w in slots["m"]]
    where = "" if layout is None else f' in layout="{layout}"'
    for form in forms:
        if _may_be(given, form):
            expected, shape = next(
                (_shape(place, shapes), w.shape)
                for w, place in zip(given, form, strict=True)
                if w.shape != _shape(place, shapes)
            )
            return ValueError(
                f"Optimizer weight shape {expected} not compatible with "
                f"provided weight shape {shape}{where}"
            )
    return _length_error(given, len(forms[0]), where + _hint(given, shapes, vhat="vhat" in slots))


def _length_error(given: list[Array], expected: int, hint: str) -> ValueError:
    return ValueError(
        f"Length of the specified weight list ({len(given)}) does not match "
        f"the number of weights of the optimizer ({expected}){hint}"
    )


def _hint(given: list[Array], shapes: Sequence[tuple[int, ...]], *, vhat: bool) -> str:
    """Describe what a list that does not fit seems to be."""
    last = [("vhat", i) for i in range(len(shapes)) if vhat]
    if shapes and [w.shape for w in given] == [*shapes, *shapes]:
        return "; Keras 1.0 saved no count of steps: insert it as the first item"
    for rate in ([_LEARNING_RATE], []):
        for extra in (["average or accumulator"], ["average", "accumulator"]):
            if shapes and _fits(given, _interleaved(len(shapes), rate, extra, last), shapes):
                return (
                    "; it seems to hold averages or accumulated gradients of Keras. Averages need "
                    "use_ema=True; accumulated gradients are not supported, since Keras then "
                    "counts calls instead of steps"
                )
    return ""


def _real_array(weight: Any, index: int) -> Array:
    array = as_array(weight, f"weights[{index}]")
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"weights[{index}] must be an array of real numbers. Received: dtype={array.dtype}"
        )
    return array


def _step_count(array: Array) -> int:
    value = array.item()
    if not 0 <= value <= max_iterations or value != int(value):
        raise ValueError(
            f"weights[0] must be a count of steps, an integer from 0 to 2**53. Received: {value!r}"
        )
    return int(value)


# ---- parameters and their low bits


def with_low_bits(state: AdamState, params: Sequence[Any]) -> list[tuple[Any, Array | None]]:
    """Return each parameter, tensors as arrays, with its low bits or None."""
    state.require_not_swapped()
    low_bits: Sequence[Array | None] = state.slots.get("low_bits", [None] * len(params))
    if len(low_bits) != len(params):
        raise ValueError(
            "params must be as many as those that the moments were built for, "
            f"{len(low_bits)}. Received: {len(params)}"
        )
    return list(zip(parameter_arrays(params), low_bits, strict=True))


def joined(param: Any, low: Array | None) -> Array:
    """Return the values of a parameter in float32."""
    return join_weights(param, _laid_out(low, param))


def _laid_out(low: Array | None, param: Any) -> Array | None:
    """Return low bits in the layout of their parameter, as a copy if they have another one.

    The state gets the layout of the parameters in a step only: until then, that of a pickle may
    have another one.
    """
    if low is None or getattr(param, "shape", None) != low.shape:
        return low
    like: Array = np.empty_like(param, low.dtype)
    if like.strides == low.strides:
        return low
    like[...] = low
    return like


def split_values(
    pairs: Sequence[tuple[Any, Array | None]], values: Sequence[Any]
) -> list[Callable[[], object]]:
    """Return calls of compiled functions that set parameters to values, which are checked."""
    if len(values) != len(pairs):
        raise ValueError(f"values must be as many as params, {len(pairs)}. Received: {len(values)}")
    calls: list[Callable[[], object]] = []
    for i, ((param, low), value) in enumerate(zip(pairs, values, strict=True)):
        turned = _laid_out(low, param)
        like = join_weights(param, turned)
        array = as_array(value, f"values[{i}]")
        if array.shape != like.shape:
            raise ValueError(
                f"values[{i}] must have the shape of params[{i}], {like.shape}. "
                f"Received: shape={array.shape}"
            )
        like[...] = array
        calls.append(partial(split_weights, like, param, turned))
        if turned is not low:
            calls.append(partial(operator.setitem, low, ..., turned))
    return calls
