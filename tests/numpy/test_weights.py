# SPDX-License-Identifier: MIT
"""Lists of weights of every library: told apart, or refused until the layout is named."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
from fusedadam import Adam
from fusedadam.weights import LAYOUTS
from helpers import Array, assert_all_same_bits, halving, values
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

Shapes: TypeAlias = Sequence[tuple[int, ...]]
ALL_DIFFER: Shapes = [(2, 3), (3,), ()]
ONE_SHAPE: Shapes = [(4,), (4,), (4,)]
SINGLE: list[Shapes] = [[()], [(1,)], [(5,)], [(1, 1)]]
COUNT, RATE, NAN, INF = 7, np.array(0.1, "float32"), float("nan"), float("inf")


class Saved(NamedTuple):
    """The state of one optimizer, as each library would have saved it."""

    m: list[Array]
    v: list[Array]
    vhat: list[Array]
    ema: list[Array]

    def grouped(self, count: Any) -> list[Any]:
        return [count, *self.m, *self.v, *self.vhat]

    def paired(self, *before: Any) -> list[Any]:
        pairs = zip(self.m, self.v, strict=True)
        return [*before, *(x for pair in pairs for x in pair), *self.vhat]


def drawn(shapes: Shapes, *, amsgrad: bool = False, positive: bool = False) -> Saved:
    """Moments as in the middle of a training, or all positive as in a toy example."""
    rng = np.random.default_rng(11)
    m, v, more, ema = ([values(rng, s, "float32") for s in shapes] for _ in range(4))
    m = [np.asarray((np.abs(x) + 1) * (1 if positive else -1)) for x in m]
    v, more = ([np.square(x) for x in kind] for kind in (v, more))
    vhat = [np.maximum(a, b) for a, b in zip(v, more, strict=True)] if amsgrad else []
    return Saved(m, v, vhat, ema)


int32, int64, float32 = (partial(np.array, dtype=name) for name in ("int32", "int64", "float32"))


class Kind(NamedTuple):
    """A library's list: layout, function to make it, resulting lr, possible values of amsgrad."""

    layout: str
    make: Callable[[Saved], list[Any]]
    lr: float = 0.001
    amsgrad: Sequence[bool] = (False, True)


def with_placeholders(saved: Saved) -> list[Any]:
    return [*saved.grouped(int64(COUNT)), *(np.zeros(1, "float32") for _ in saved.m)]


KINDS: dict[str, Kind] = {
    "Keras 1": Kind("keras-2", lambda s: s.grouped(float32(COUNT)), amsgrad=[False]),
    "TensorFlow 1.4": Kind("keras-2", lambda s: s.grouped(int64(COUNT))),
    "by hand": Kind("fusedadam", lambda s: s.grouped(COUNT)),
    "Keras 2.1.3": Kind("keras-2", with_placeholders, amsgrad=[False]),
    "Keras 3 on TensorFlow": Kind("keras-3", lambda s: s.paired(int64(COUNT), RATE), 0.1),
    "Keras 3 on torch": Kind("keras-3", lambda s: s.paired(int32(COUNT), RATE), 0.1),
    "tf_keras": Kind("keras-3-schedule", lambda s: s.paired(int64(COUNT))),
    "Keras 3, schedule": Kind("keras-3-schedule", lambda s: s.paired(int32(COUNT))),
}
CASES = [(name, amsgrad) for name, kind in KINDS.items() for amsgrad in kind.amsgrad]
kinds = pytest.mark.parametrize(
    ("kind", "amsgrad"),
    [(KINDS[name], amsgrad) for name, amsgrad in CASES],
    ids=[f"{name}, amsgrad={amsgrad}" for name, amsgrad in CASES],
)


def built(shapes: Shapes, **options: Any) -> Adam:
    adam = Adam(**options)
    adam.build([np.full(s, 2.0, "float32") for s in shapes])
    return adam


def check(adam: Adam, saved: Saved, lr: Any = 0.001) -> None:
    assert_all_same_bits(adam.weights, saved.grouped(int64(COUNT)))
    assert adam.iterations == COUNT
    assert adam.lr == lr


def refused(adam: Adam, weights: Any, pattern: str, error: Any = ValueError, **layout: Any) -> None:
    before = copy.deepcopy([*adam.weights, *adam.ema]), adam.get_config()
    with pytest.raises(error, match=pattern):
        adam.set_weights(weights, **layout)
    assert_all_same_bits([*adam.weights, *adam.ema], before[0])
    assert adam.get_config() == before[1]


# -- each kind --------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "shapes", [[], ALL_DIFFER, ONE_SHAPE, [()] * 4, [(1,)] * 2, *SINGLE], ids=str
)
@pytest.mark.parametrize("named", [False, True])
def test_list_is_read_as_what_it_is(kind: Kind, amsgrad: bool, shapes: Shapes, named: bool) -> None:
    saved = drawn(shapes, amsgrad=amsgrad)
    adam = built(shapes, amsgrad=amsgrad)
    adam.set_weights(kind.make(saved), kind.layout if named else None)
    check(adam, saved, kind.lr)


@kinds
def test_list_where_nothing_but_the_dtype_of_the_count_decides(kind: Kind, amsgrad: bool) -> None:
    saved = drawn(ONE_SHAPE, amsgrad=amsgrad, positive=True)
    # Otherwise vhat would be smaller than v in the other order, which would decide.
    saved = saved._replace(vhat=[x + 10_000 for x in saved.vhat])
    weights = kind.make(saved)
    adam = built(ONE_SHAPE, amsgrad=amsgrad)
    decided = len(weights) != len(adam.weights) or getattr(weights[0], "dtype", "int64") != "int64"
    if not decided:
        choices = r'.*layout="fusedadam".*layout="keras-3-schedule".*Received: layout=None$'
        refused(adam, weights, "^weights could be a list of more than one layout" + choices)
    adam.set_weights(weights, None if decided else kind.layout)
    check(adam, saved, kind.lr)


def test_count_written_by_hand_decides_nothing_where_it_is_int32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = drawn(ONE_SHAPE, positive=True).grouped(int32(COUNT))
    adam, array = built(ONE_SHAPE), np.array
    monkeypatch.setattr(np, "array", lambda x, *a: array(x, *a or ("int32",)))  # NumPy 1 on Windows
    with pytest.raises(ValueError, match="more than one layout"):
        adam.set_weights(weights)


@pytest.mark.parametrize("count", [int32(COUNT), float32(COUNT)], ids=["int32", "float32"])
def test_dtype_of_the_count_does_not_outweigh_a_sign(count: Array) -> None:
    # As after a conversion by JAX, or from a flat vector.
    saved = drawn(ONE_SHAPE)
    for weights in (saved.grouped(count), saved.paired(count)):
        adam = built(ONE_SHAPE)
        adam.set_weights(weights)
        check(adam, saved)


@kinds
def test_layouts_that_give_the_same_values_need_no_name(kind: Kind, amsgrad: bool) -> None:
    zeros = [np.zeros(4, "float32") for _ in ONE_SHAPE]
    moment = np.array([0, 0, NAN, 0], "float32")
    saved = Saved([moment] * 3, [moment] * 3, zeros if amsgrad else [], zeros)
    adam = built(ONE_SHAPE, amsgrad=amsgrad)
    adam.set_weights(kind.make(saved))
    check(adam, saved, kind.lr)


@settings(max_examples=100)
@given(data=st.data())
def test_no_list_is_silently_misread(data: st.DataObject) -> None:
    name, amsgrad = data.draw(st.sampled_from(CASES))
    kind = KINDS[name]
    shape = data.draw(st.sampled_from([(), (1,), (2,)]))
    count = data.draw(st.integers(1, 4))
    element = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, NAN]).map(np.float32)

    def some() -> list[Any]:
        return [data.draw(arrays("float32", shape, elements=element)) for _ in range(count)]

    m, v = some(), [np.abs(x) for x in some()]
    vhat = [np.maximum(x, np.abs(y)) for x, y in zip(v, some(), strict=True)] if amsgrad else []
    saved = Saved(m, v, vhat, [])
    weights = kind.make(saved)
    adam = built([shape] * count, amsgrad=amsgrad)
    try:
        adam.set_weights(weights)
    except ValueError as error:
        layout = kind.layout.replace("keras-2", "fusedadam")
        assert f'layout="{layout}"' in str(error)  # noqa: PT017
    else:
        check(adam, saved, kind.lr)
    adam.set_weights(weights, layout=kind.layout)
    check(adam, saved, kind.lr)


# -- how the layout is determined -------------------------------------------------------------


AMBIGUOUS, IMPOSSIBLE = "more than one layout", "^weights must be in a layout that they can have. "
# Scalars after the count; whether vhat is among them; and the order in which m and v are read, or
# the error.
SIGNS: list[tuple[tuple[float, ...], bool, list[int] | str]] = [
    ((1, -1, 2, 3), False, [0, 1, 2, 3]),
    ((1, 2, -1, 3), False, [0, 2, 1, 3]),
    ((1, -0.0, 2, 3), False, [0, 1, 2, 3]),
    ((1, 2, -0.0, 3), False, [0, 2, 1, 3]),
    ((1, -NAN, 2, 3), False, AMBIGUOUS),
    ((-1, 1, 2, 3), False, AMBIGUOUS),
    ((-1, 2, 2, 3), False, [0, 1, 2, 3]),
    ((0, 0, -0.0, 0, 0, 0), False, AMBIGUOUS),  # the sign of zero is a value
    ((1, 5, 2, 3, 2, 3), True, [0, 1, 2, 3, 4, 5]),  # in pairs, v0=5 and vhat0=2
    (
        (1, -1, -2, 1),
        False,
        IMPOSSIBLE + r'Received: not "fusedadam": v of params\[0\] would be negative; '
        r'not "keras-3-schedule": v of params\[0\] would be negative$',
    ),
]


@pytest.mark.parametrize(("numbers", "amsgrad", "read"), SIGNS, ids=str)
def test_sign_decides_which_are_second_moments(
    numbers: Any, amsgrad: bool, read: list[int] | str
) -> None:
    adam = built([()] * (len(numbers) // (3 if amsgrad else 2)), amsgrad=amsgrad)
    weights = [COUNT, *map(float32, numbers)]
    if isinstance(read, str):
        refused(adam, weights, read)
    else:
        adam.set_weights(weights)
        np.testing.assert_array_equal(adam.weights, [COUNT, *(numbers[i] for i in read)])


# -- named layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["keras", "", 3, ["keras-2"], "Keras-2"], ids=repr)
@pytest.mark.parametrize("adam", [built(ONE_SHAPE), Adam()], ids=["built", "no state"])
def test_layout_that_there_is_not(layout: Any, adam: Adam) -> None:
    choices = ", ".join(map(repr, LAYOUTS))
    message = re.escape(f"layout must be None or one of {choices}. Received: {layout!r}")
    refused(adam, adam.get_weights(), f"^{message}$", layout=layout)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_list_before_there_are_weights(count: int) -> None:
    adam, given = Adam(), [np.array(3), np.ones(2), np.ones(2)][:count]
    for layout in (None, "keras-3"):
        if given:
            message = rf"weight list \({count}\) .* optimizer \(0\); build\(params\)"
            refused(adam, given, "^Length of the specified " + message, layout=layout)
        else:
            adam.set_weights(given, layout)
    assert (adam.iterations, adam.weights) == (0, [])


@pytest.mark.parametrize("positive", [False, True])
@kinds
def test_list_of_another_layout_than_named(kind: Kind, amsgrad: bool, positive: bool) -> None:
    shapes = ALL_DIFFER if positive else ONE_SHAPE
    weights = kind.make(drawn(shapes, amsgrad=amsgrad, positive=positive))
    adam = built(shapes, amsgrad=amsgrad)
    for layout in LAYOUTS:
        if not {kind.layout, layout} <= {"fusedadam", "keras-2"} and layout != kind.layout:
            message = f'in layout="{layout}"$|Received: not "{layout}": v of params'
            refused(adam, weights, message, layout=layout)


# -- the learning rate of Keras 3 ---------------------------------------------------------------

RATES: list[tuple[Any, float]] = [
    (np.array(0.1, "float32"), 0.1),  # not 0.10000000149011612
    (np.array(1e-3, "float32"), 1e-3),
    (np.array(0.1), 0.1),
    (np.float32(0.25), 0.25),
    (np.array(0.1, "float16"), 0.1),
    (0.5, 0.5),
]


@pytest.mark.parametrize(("rate", "lr"), RATES, ids=repr)
def test_rate_is_the_shortest_decimal(rate: Any, lr: float) -> None:
    saved, adam, scheduled = drawn(ALL_DIFFER), built(ALL_DIFFER), built(ALL_DIFFER, lr=halving)
    for each in (adam, scheduled):
        each.set_weights(saved.paired(COUNT, rate))
    check(adam, saved, lr)
    assert type(adam.get_config()["lr"]) is float
    check(scheduled, saved, halving)


@pytest.mark.parametrize("rate", [-1.0, NAN, INF, float32(-0.5), np.array([0.5, 0.5])])
def test_rate_that_is_none(rate: Any) -> None:
    weights, adam = drawn(ALL_DIFFER).paired(COUNT, rate), built(ALL_DIFFER)
    is_scalar = np.ndim(rate) == 0
    refused(adam, weights, "lr" if is_scalar else "weight shape|^Length of")
    message = 'not "keras-3": a learning rate of ' if is_scalar else "^Length of"
    refused(adam, weights, message, layout="keras-3")


# -- this package's lists ---------------------------------------------------------------------

FORMS: dict[str, Callable[[list[Array]], Any]] = {
    "as it is": lambda w: w,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
}
# Lists that have lost the type of those of get_weights. Shapes tell their layout.
UNTYPED: dict[str, Callable[[list[Array]], Any]] = {
    "tuple": tuple,
    "int": lambda w: [int(w[0]), *w[1:]],
    "int32": lambda w: [np.int32(w[0]), *w[1:]],
    "Fortran order": lambda w: [w[0], *(np.array(a, order="F") for a in w[1:])],
    "views": lambda w: [w[0], *(a[..., None][..., 0] for a in w[1:])],
}


@pytest.mark.parametrize("form", [*FORMS, *UNTYPED])
@pytest.mark.parametrize("live", [False, True])
def test_set_weights_is_the_inverse_of_get_weights(form: str, live: bool) -> None:
    shapes = ONE_SHAPE if form in FORMS else ALL_DIFFER
    adam, restored = built(shapes, amsgrad=True), built(shapes, amsgrad=True)
    for i, moment in enumerate(adam.weights[1:]):
        moment[...] = -i - 1  # which no second moment can be
    expected = adam.get_weights()
    weights = (FORMS | UNTYPED)[form](adam.weights if live else adam.get_weights())
    for each in (restored, adam):
        each.set_weights(weights)
        assert_all_same_bits(each.weights, expected)


def test_set_weights_copies() -> None:
    adam = built(ALL_DIFFER)
    live, given = adam.weights, [np.asarray(w + 1) for w in adam.get_weights()]
    kept = [w.copy() for w in given]
    adam.set_weights(given)
    for w in given[1:]:
        w[...] = 0
    assert_all_same_bits(adam.weights, kept)
    assert_all_same_bits(live[1:], kept[1:], "arrays that were live before")
    # Source and destination are the same arrays in another order.
    adam = built(ONE_SHAPE)
    count, *live = adam.weights
    for i, w in enumerate(live):
        w[...] = i
    swapped = [count, *copy.deepcopy(live[3:] + live[:3])]
    adam.set_weights([count, *live[3:], *live[:3]], layout="fusedadam")
    assert_all_same_bits(adam.weights, swapped)


@pytest.mark.parametrize("layout", ["keras-3", "keras-3-schedule"])
def test_own_list_is_of_no_other_layout(layout: str) -> None:
    adam = built(ONE_SHAPE)
    message = r"^Length of .* in layout=|the list is of get_weights$"
    refused(adam, adam.get_weights(), message, layout=layout)
    for own in ("fusedadam", "keras-2"):
        adam.set_weights(adam.get_weights(), layout=own)


def test_list_that_has_lost_its_type() -> None:
    adam, restored = built(ONE_SHAPE), built(ONE_SHAPE)
    for i, moment in enumerate(adam.weights[1:]):
        moment[...] = i
    weights = [w.copy() for w in adam.get_weights()]
    refused(adam, weights, 'layout="fusedadam"')
    restored.set_weights(weights, layout="fusedadam")
    assert_all_same_bits(restored.weights, adam.weights)


# -- averages, accumulators and other state ----------------------------------------------------


@pytest.mark.parametrize("shapes", [ALL_DIFFER, ONE_SHAPE, [(1,)]], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("rate", "lr"), [([RATE], 0.1), ([], 0.001)], ids=["rate", "schedule"])
def test_averages_of_keras_3_are_taken_over(
    shapes: Shapes, amsgrad: bool, rate: list[Any], lr: float
) -> None:
    saved = drawn(shapes, amsgrad=amsgrad)
    adam = built(shapes, amsgrad=amsgrad, use_ema=True)
    old = copy.deepcopy(adam.ema)
    for averages in ([], saved.ema):
        adam.set_weights(saved.paired(int32(COUNT), *rate, *averages))
        check(adam, saved, lr)
        assert_all_same_bits(adam.ema, averages or old)


def test_scalar_that_is_a_rate_or_an_average() -> None:
    adam = built([()], use_ema=True)
    count, number, *moments = [int64(3), *(float32(x) for x in (0.5, 1.0, 2.0))]
    weights = [count, number, *moments]
    refused(adam, weights, 'more than one layout.*"keras-3".*"keras-3-schedule"')
    negative = [count, -number, *moments]
    for each, layout, expected in [
        (weights, "keras-3-schedule", [0.5, 0.001]),
        (negative, None, [-0.5, 0.001]),
        (weights, "keras-3", [-0.5, 0.5]),
    ]:
        adam.set_weights(each, layout)
        np.testing.assert_array_equal([adam.ema[0], adam.lr], expected)


@pytest.mark.parametrize("rate", [[RATE], []], ids=["rate", "schedule"])
@pytest.mark.parametrize(
    ("extra", "options"),
    [(1, {}), (1, {"gradient_accumulation_steps": 2}), (2, {}), (2, {"use_ema": True})],
    ids=str,
)
def test_averages_and_accumulators_that_cannot_be_taken(
    rate: list[Any], extra: int, options: dict[str, Any]
) -> None:
    saved = drawn(ALL_DIFFER)
    weights = saved.paired(int32(COUNT), *rate, *saved.ema * extra)
    message = rf"^Length of .* \({len(weights)}\) .* \(7\); it seems to hold averages"
    refused(built(ALL_DIFFER, **options), weights, message)


# -- lists that do not fit ----------------------------------------------------------------------


def test_list_without_a_count() -> None:
    saved, adam = drawn(ALL_DIFFER), built(ALL_DIFFER)
    _, *weights = saved.grouped(COUNT)
    refused(adam, weights, r"^Length of .* \(6\) .* \(7\); Keras 1.0 saved no count of steps")
    adam.set_weights([COUNT, *weights])
    check(adam, saved)


LISTS: dict[str, Callable[[Saved], list[Any]]] = {
    "grouped": lambda s: s.grouped(COUNT),
    "with placeholders": with_placeholders,
    "Keras 3": lambda s: s.paired(int32(COUNT), RATE),
}


@pytest.mark.parametrize(
    ("form", "position"),
    [(form, i) for form in LISTS for i in range(8 if form == "Keras 3" else 7)],
)
def test_array_of_another_shape(form: str, position: int) -> None:
    weights = LISTS[form](drawn(ALL_DIFFER))
    shape = re.escape(str(np.shape(weights[position])))
    weights[position] = np.zeros((4, 7))
    message = (
        rf"^Optimizer weight shape {shape} not compatible with provided weight shape \(4, 7\)$"
    )
    if form == "Keras 3" and position == 1:  # no rate, so no list of Keras 3
        message = r"^Length of the specified weight list \(8\)"
    refused(built(ALL_DIFFER), weights, message)


def test_placeholders_are_zeros_of_an_optimizer_without_amsgrad() -> None:
    # Otherwise vhat would be taken for placeholders, and lost.
    shapes: Shapes = [(1,), (1,)]
    with_vhat = drawn(shapes, amsgrad=True).grouped(int64(COUNT))
    refused(built(shapes), with_vhat, r"^Length of .* \(7\) .* \(5\)")
    saved, adam = drawn(ALL_DIFFER), built(ALL_DIFFER, amsgrad=True)
    refused(adam, saved.grouped(COUNT), r"^Length of the specified weight list \(7\)")
    refused(adam, with_placeholders(saved), r"^Optimizer weight shape \(2, 3\)")
