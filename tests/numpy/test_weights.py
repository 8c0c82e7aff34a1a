# SPDX-License-Identifier: MIT
"""Lists of weights of every library: told apart, or refused until the layout is named."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fusedadam import Adam
from fusedadam.weights import LAYOUTS
from helpers import Array, assert_all_same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

Shape = tuple[int, ...]
ALL_DIFFER: list[Shape] = [(2, 3), (3,), ()]
ONE_SHAPE: list[Shape] = [(4,), (4,), (4,)]
COUNT, RATE = 7, np.array(0.1, "float32")


class Saved:
    """The state of one optimizer, as each library would have saved it."""

    def __init__(
        self, m: Sequence[Array], v: Sequence[Array], vhat: Sequence[Array], ema: Sequence[Array]
    ) -> None:
        self.m, self.v, self.vhat, self.ema = list(m), list(v), list(vhat), list(ema)

    @classmethod
    def drawn(cls, shapes: Sequence[Shape], *, amsgrad: bool, positive: bool = False) -> Saved:
        """Moments as in the middle of a training, or all positive as in a toy example."""
        rng = np.random.default_rng(11)
        m, v, more, ema = ([values(rng, s, "float32") for s in shapes] for _ in range(4))
        v, more = ([np.square(x) for x in kind] for kind in (v, more))
        if positive:
            m = [np.abs(x) + 1 for x in m]
        else:
            for x in m:
                x[...] = -np.abs(x) - 1
        vhat = [np.maximum(a, b) for a, b in zip(v, more, strict=True)] if amsgrad else []
        return cls(m, v, vhat, ema)

    def grouped(self, count: Any) -> list[Any]:
        return [count, *self.m, *self.v, *self.vhat]

    def pairs(self) -> list[Array]:
        return [x for pair in zip(self.m, self.v, strict=True) for x in pair]


def int32(value: int) -> Array:
    return np.array(value, "int32")


def int64(value: int) -> Array:
    return np.array(value, "int64")


def float32(value: int) -> Array:
    return np.array(value, "float32")


class Kind:
    """A library's list: layout, function to make it, resulting lr, possible values of amsgrad."""

    def __init__(
        self,
        layout: str,
        make: Callable[[Saved], list[Any]],
        lr: float = 0.001,
        amsgrad: Sequence[bool] = (False, True),
    ) -> None:
        self.layout, self.make, self.lr, self.amsgrad = layout, make, lr, amsgrad


def placeholders(saved: Saved) -> list[Any]:
    return [*saved.grouped(int64(COUNT)), *(np.zeros(1, "float32") for _ in saved.m)]


KINDS: dict[str, Kind] = {
    "Keras 1": Kind("keras-2", lambda s: s.grouped(float32(COUNT)), amsgrad=[False]),
    "TensorFlow 1.4": Kind("keras-2", lambda s: s.grouped(int64(COUNT))),
    "by hand": Kind("fusedadam", lambda s: s.grouped(COUNT)),
    "Keras 2.1.3": Kind("keras-2", placeholders, amsgrad=[False]),
    **{
        f"Keras 3{where}": Kind(
            "keras-3",
            lambda s, count=count: [count(COUNT), RATE, *s.pairs(), *s.vhat],  # type: ignore[misc]
            0.1,
        )
        for where, count in ((" on TensorFlow", int64), (" on torch", int32))
    },
    **{
        name: Kind(
            "keras-3-schedule",
            lambda s, count=count: [count(COUNT), *s.pairs(), *s.vhat],  # type: ignore[misc]
        )
        for name, count in (("tf_keras", int64), ("Keras 3 with a schedule, on torch", int32))
    },
}
CASES = [(name, amsgrad) for name, kind in KINDS.items() for amsgrad in kind.amsgrad]
kinds = pytest.mark.parametrize(
    ("kind", "amsgrad"),
    [(KINDS[name], amsgrad) for name, amsgrad in CASES],
    ids=[f"{name}, amsgrad={amsgrad}" for name, amsgrad in CASES],
)


def built(shapes: Sequence[Shape], **options: Any) -> Adam:
    adam = Adam(**options)
    adam.build([np.full(s, 2.0, "float32") for s in shapes])
    return adam


def check(adam: Adam, saved: Saved, lr: float = 0.001) -> None:
    assert_all_same_bits(adam.weights, saved.grouped(int64(COUNT)))
    assert adam.lr == lr


def refused(adam: Adam, weights: Any, pattern: str, error: Any = ValueError, **layout: Any) -> None:
    before = copy.deepcopy([*adam.weights, *adam.ema]), adam.get_config()
    with pytest.raises(error, match=pattern):
        adam.set_weights(weights, **layout)
    assert_all_same_bits([*adam.weights, *adam.ema], before[0])
    assert adam.get_config() == before[1]


# -- each kind --------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shapes", [ALL_DIFFER, ONE_SHAPE, [()] * 4, [(1,)] * 2, [(5,)]], ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_list_is_read_as_what_it_is(
    kind: Kind, amsgrad: bool, shapes: list[Shape], named: bool
) -> None:
    saved = Saved.drawn(shapes, amsgrad=amsgrad)
    adam = built(shapes, amsgrad=amsgrad)
    adam.set_weights(kind.make(saved), kind.layout if named else None)
    check(adam, saved, kind.lr)


@kinds
def test_list_of_no_parameters(kind: Kind, amsgrad: bool) -> None:
    adam = built([], amsgrad=amsgrad)
    adam.set_weights(kind.make(Saved([], [], [], [])))
    check(adam, Saved([], [], [], []), kind.lr)


@kinds
def test_list_where_nothing_but_the_dtype_of_the_count_decides(kind: Kind, amsgrad: bool) -> None:
    saved = Saved.drawn(ONE_SHAPE, amsgrad=amsgrad, positive=True)
    # Otherwise vhat would be smaller than v in the other order, which would decide.
    saved.vhat = [x + 10_000 for x in saved.vhat]
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
    saved = Saved.drawn(ONE_SHAPE, amsgrad=False, positive=True)
    adam, array = built(ONE_SHAPE), np.array
    monkeypatch.setattr(np, "array", lambda x, *a: array(x, *a or ("int32",)))  # NumPy 1 on Windows
    with pytest.raises(ValueError, match="more than one layout"):
        adam.set_weights(saved.grouped(int32(COUNT)))


@pytest.mark.parametrize("count", [int32, float32])
def test_dtype_of_the_count_does_not_outweigh_a_sign(count: Callable[[int], Array]) -> None:
    # As after a conversion by JAX, or from a flat vector.
    saved = Saved.drawn(ONE_SHAPE, amsgrad=False)
    for weights in (saved.grouped(count(COUNT)), [count(COUNT), *saved.pairs()]):
        adam = built(ONE_SHAPE)
        adam.set_weights(weights)
        check(adam, saved)


@kinds
def test_layouts_that_give_the_same_values_need_no_name(kind: Kind, amsgrad: bool) -> None:
    zeros = [np.zeros(4, "float32") for _ in ONE_SHAPE]
    zeros[1][2] = np.nan
    saved = Saved(zeros, zeros, zeros if amsgrad else [], zeros)
    saved.m = saved.v = [zeros[1]] * 3
    adam = built(ONE_SHAPE, amsgrad=amsgrad)
    adam.set_weights(kind.make(saved))
    check(adam, saved, kind.lr)


@settings(max_examples=200)
@given(data=st.data())
def test_no_list_is_silently_misread(data: st.DataObject) -> None:
    name, amsgrad = data.draw(st.sampled_from(CASES))
    kind = KINDS[name]
    shape = data.draw(st.sampled_from([(), (1,), (2,)]))
    count = data.draw(st.integers(1, 4))
    element = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("nan")]).map(np.float32)

    def drawn() -> list[Any]:
        return [data.draw(arrays("float32", shape, elements=element)) for _ in range(count)]

    m, v = drawn(), [np.abs(x) for x in drawn()]
    vhat = [np.maximum(x, np.abs(y)) for x, y in zip(v, drawn(), strict=True)] if amsgrad else []
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


def of_two_scalars(*numbers: float) -> list[Any]:
    return [COUNT, *(np.array(x, "float32") for x in numbers)]


NAN = float("nan")


@pytest.mark.parametrize(
    ("numbers", "layout"),
    [
        ((1, -1, 2, 3), "fusedadam"),
        ((1, 2, -1, 3), "keras-3-schedule"),
        ((1, -0.0, 2, 3), "fusedadam"),
        ((1, 2, -0.0, 3), "keras-3-schedule"),
        ((1, -NAN, 2, 3), None),
        ((-1, 1, 2, 3), None),
        ((-1, 2, 2, 3), "both"),
    ],
    ids=str,
)
def test_sign_decides_which_are_second_moments(numbers: Any, layout: str | None) -> None:
    adam = built([(), ()])
    if layout is None:
        refused(adam, of_two_scalars(*numbers), "more than one layout")
        return
    adam.set_weights(of_two_scalars(*numbers))
    a, b, c, d = numbers
    m0, m1, v0, v1 = (a, c, b, d) if layout == "keras-3-schedule" else (a, b, c, d)
    np.testing.assert_array_equal(adam.weights, [COUNT, m0, m1, v0, v1])


def test_sign_of_zero_is_a_value() -> None:
    numbers = [np.array(x, "float32") for x in (0.0, 0.0, -0.0, 0.0, 0.0, 0.0)]
    refused(built([(), (), ()]), [COUNT, *numbers], "more than one layout")


def test_maximum_is_not_less_than_what_it_is_of() -> None:
    adam = built([(), ()], amsgrad=True)
    m0, m1, v0, v1, vhat0, vhat1 = 1, 5, 2, 3, 2, 3  # in pairs: v0=5 and vhat0=2
    adam.set_weights(of_two_scalars(m0, m1, v0, v1, vhat0, vhat1))
    np.testing.assert_array_equal(adam.weights, [COUNT, m0, m1, v0, v1, vhat0, vhat1])


def test_list_that_no_layout_can_have() -> None:
    adam = built([(), ()])
    message = (
        "^weights must be in a layout that they can have. Received: "
        'not "fusedadam": v of params[0] would be negative; '
        'not "keras-3-schedule": v of params[0] would be negative$'
    )
    refused(adam, of_two_scalars(1, -1, -2, 1), message.replace("[", r"\["))


# -- named layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["keras", "", 3, ["keras-2"], "Keras-2"], ids=repr)
@pytest.mark.parametrize("shapes", [ONE_SHAPE, None], ids=["built", "no state"])
def test_layout_that_there_is_not(layout: Any, shapes: list[Shape] | None) -> None:
    adam = Adam() if shapes is None else built(shapes)
    weights = adam.get_weights()
    message = (
        f"^layout must be None or one of {', '.join(map(repr, LAYOUTS))}. Received: {layout!r}"
    )
    refused(adam, weights, re.escape(message).replace(r"\^", "^") + "$", layout=layout)


def test_layout_before_there_are_weights() -> None:
    Adam().set_weights([], layout="keras-3")
    refused(Adam(), [3], r"^Length of .* \(1\) .* \(0\); build\(params\)", layout="keras-3")


@pytest.mark.parametrize("positive", [False, True])
@kinds
def test_list_of_another_layout_than_named(kind: Kind, amsgrad: bool, positive: bool) -> None:
    saved = Saved.drawn(ALL_DIFFER if positive else ONE_SHAPE, amsgrad=amsgrad, positive=positive)
    adam = built([m.shape for m in saved.m], amsgrad=amsgrad)
    for layout in LAYOUTS:
        if not {kind.layout, layout} <= {"fusedadam", "keras-2"} and layout != kind.layout:
            refused(
                adam,
                kind.make(saved),
                f'in layout="{layout}"$|Received: not "{layout}": v of params',
                layout=layout,
            )


def test_rate_that_is_none_contradicts() -> None:
    saved = Saved.drawn(ALL_DIFFER, amsgrad=False)
    weights = [COUNT, np.float32(-1), *saved.pairs()]
    adam = built(ALL_DIFFER)
    refused(adam, weights, "lr")
    refused(adam, weights, 'not "keras-3": a learning rate of -1.0', layout="keras-3")


# -- this package's lists ---------------------------------------------------------------------

TRIPS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda w: w,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_set_weights_is_the_inverse_whatever_the_moments_are(
    trip: Callable[[Any], Any], live: bool, amsgrad: bool, sign: int
) -> None:
    adam = built(ONE_SHAPE, amsgrad=amsgrad)
    for i, moment in enumerate(adam.weights[1:]):
        moment[...] = sign * (i + 1)
    weights = trip(adam.weights if live else adam.get_weights())
    assert isinstance(weights, list)
    kept = copy.deepcopy(list(weights))
    restored = built(ONE_SHAPE, amsgrad=amsgrad)
    for each in (restored, adam):
        each.set_weights(weights)
        assert_all_same_bits(each.weights, kept)


@pytest.mark.parametrize("layout", ["keras-3", "keras-3-schedule"])
def test_own_list_is_of_no_other_layout(layout: str) -> None:
    adam = built(ONE_SHAPE)
    message = r"^Length of .* in layout=|the list is of get_weights$"
    refused(adam, adam.get_weights(), message, layout=layout)
    for own in ("fusedadam", "keras-2"):
        adam.set_weights(adam.get_weights(), layout=own)


@pytest.mark.parametrize("way", ["comprehension", "npz"])
def test_list_that_has_lost_its_type(tmp_path: Path, way: str) -> None:
    adam = built(ONE_SHAPE)
    for i, moment in enumerate(adam.weights[1:]):
        moment[...] = i
    weights: list[Any] = [w.copy() for w in adam.get_weights()]
    if way == "npz":
        np.savez(tmp_path / "weights.npz", *weights)
        with np.load(tmp_path / "weights.npz") as file:
            weights = list(file.values())
    refused(adam, weights, 'layout="fusedadam"')
    restored = built(ONE_SHAPE)
    restored.set_weights(weights, layout="fusedadam")
    assert_all_same_bits(restored.weights, adam.weights)


# -- averages, accumulators and other state ----------------------------------------------------


@pytest.mark.parametrize("shapes", [ALL_DIFFER, ONE_SHAPE, [(1,)]], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("rate", "lr"), [([RATE], 0.1), ([], 0.001)], ids=["rate", "schedule"])
def test_averages_of_keras_3_are_taken_over(
    shapes: list[Shape], amsgrad: bool, rate: list[Any], lr: float
) -> None:
    saved = Saved.drawn(shapes, amsgrad=amsgrad)
    adam = built(shapes, amsgrad=amsgrad, use_ema=True)
    old = copy.deepcopy(adam.ema)
    for averages in ([], saved.ema):
        adam.set_weights([int32(COUNT), *rate, *averages, *saved.pairs(), *saved.vhat])
        check(adam, saved, lr)
        assert_all_same_bits(adam.ema, averages or old)


def test_scalar_that_is_a_rate_or_an_average() -> None:
    adam = built([()], use_ema=True)
    weights = [int64(3), *(np.array(x, "float32") for x in (0.5, 1.0, 2.0))]
    refused(adam, weights, 'more than one layout.*"keras-3".*"keras-3-schedule"')
    adam.set_weights(weights, layout="keras-3-schedule")
    np.testing.assert_array_equal([adam.ema[0], adam.lr], [0.5, 0.001])
    adam.set_weights([weights[0], -weights[1], *weights[2:]])
    np.testing.assert_array_equal([adam.ema[0], adam.lr], [-0.5, 0.001])
    adam.set_weights(weights, layout="keras-3")
    np.testing.assert_array_equal([adam.ema[0], adam.lr], [-0.5, 0.5])


@pytest.mark.parametrize("rate", [[RATE], []], ids=["rate", "schedule"])
@pytest.mark.parametrize(
    ("extra", "options"),
    [(1, {}), (1, {"gradient_accumulation_steps": 2}), (2, {}), (2, {"use_ema": True})],
    ids=str,
)
def test_averages_and_accumulators_that_cannot_be_taken(
    rate: list[Any], extra: int, options: dict[str, Any]
) -> None:
    saved = Saved.drawn(ALL_DIFFER, amsgrad=False)
    weights = [int32(COUNT), *rate, *saved.ema * extra, *saved.pairs()]
    adam = built(ALL_DIFFER, **options)
    message = rf"^Length of .* \({len(weights)}\) .* \(7\); it seems to hold averages"
    refused(adam, weights, message)


def test_list_without_a_count() -> None:
    saved = Saved.drawn(ALL_DIFFER, amsgrad=False)
    weights = [*saved.m, *saved.v]
    adam = built(ALL_DIFFER)
    refused(adam, weights, r"^Length of .* \(6\) .* \(7\); Keras 1.0 saved no count of steps")
    adam.set_weights([COUNT, *weights])
    check(adam, saved)


def test_placeholders_are_zeros() -> None:
    # Otherwise it would be taken for the list of an optimizer with amsgrad, and the maxima would be
    # lost.
    saved = Saved.drawn([(1,), (1,)], amsgrad=True)
    refused(built([(1,), (1,)]), saved.grouped(int64(COUNT)), r"^Length of .* \(7\) .* \(5\)")


def test_list_of_keras_3_with_a_moment_of_another_shape() -> None:
    saved = Saved.drawn(ALL_DIFFER, amsgrad=False)
    weights = [int32(COUNT), RATE, *saved.pairs()]
    weights[4] = np.zeros((3, 3))
    message = r"^Optimizer weight shape \(3,\) not compatible with provided weight shape \(3, 3\)$"
    refused(built(ALL_DIFFER), weights, message)


@pytest.mark.parametrize("position", [0, 3])
def test_masked_weights_are_refused(position: int) -> None:
    adam = built(ALL_DIFFER)
    weights: list[Any] = [w + 1 for w in adam.get_weights()]
    weights[position] = np.ma.masked_array(weights[position])
    message = rf"^weights\[{position}\] must have no mask.*Received: MaskedArray$"
    refused(adam, weights, message, TypeError)
