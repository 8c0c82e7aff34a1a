# SPDX-License-Identifier: MIT
"""Every refused call: its message says what, where and why, and the call changes nothing.

Most faults are in the table of tests/support/faults.py, from which the fuzz tests draw as well. A
message must contain the argument's name and index, the key words of the rule and the received
value. The wording is free, except for the messages of Keras.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import pytest
from bad_settings import BAD_VALUES, BadValue, whole
from faults import EITHER, FAULTS, FOREIGN, ROUTES, CallersError, Program, Refused
from fresh_python import run_python
from fusedadam import Adam, adam_step
from fusedadam.own_settings import STRUCTURAL
from helpers import Array, assert_all_same_bits, halving
from training import ShapesAndDtypes, Training

PLAIN: ShapesAndDtypes = [((3,), "float64"), ((4, 6), "float32"), ((), "float32")]
ALIKE: ShapesAndDtypes = [((2, 3), "float32")] * 3
TABLE: ShapesAndDtypes = [((6, 2), "float32")]

# The shapes, the number of steps before the refused call, and options.
PROGRAMS: dict[str, tuple[ShapesAndDtypes, int, dict[str, Any]]] = {
    "built": (PLAIN, 1, {}),
    "fresh": (PLAIN, 0, {}),
    "alike": (ALIKE, 1, {}),
    "alike, built": (ALIKE, 0, {}),
    "fresh, alike": (ALIKE, 0, {}),
    "table": (TABLE, 1, {}),
    "fresh table": (TABLE, 0, {}),
    "zeroing": ([PLAIN[0], *ALIKE], 1, {"zero_grad": True, "amsgrad": True, "use_ema": True}),
    "zeroing table": (TABLE, 1, {"zero_grad": True}),
    "swapped": (PLAIN, 1, {"use_ema": True}),
    "accumulating": (ALIKE, 4, {"gradient_accumulation_steps": 3, "use_ema": True}),
    "schedule": (PLAIN, 1, {"lr": halving, "use_ema": True}),
    "accumulating table": (TABLE, 1, {"gradient_accumulation_steps": 3}),
}


def made(program: str = "built", **more: Any) -> Training:
    shapes_and_dtypes, steps, options = PROGRAMS[program]
    training = Training(shapes_and_dtypes, **{"lr": 0.01, **options, **more})
    training.step(steps)
    if program == "alike, built":
        training.optimizer.build(training.params)
    if program == "swapped":
        training.optimizer.swap_ema()
    return training


def assert_message(call: Callable[[], object], errors: Any, pattern: str) -> None:
    with pytest.raises(errors) as caught:
        call()
    is_right = errors is CallersError or re.fullmatch(pattern, str(caught.value), re.DOTALL)
    assert is_right, f"message: {caught.value}"


def assert_refused(training: Training, refused: Refused, kept: list[Array] | None = None) -> None:
    """The message is right, nothing has changed, and the next steps equal the oracle's."""
    before = training.visible()
    arrays = [*refused.kept, *(kept or [])]
    copies = [np.array(a) for a in arrays]
    pattern = whole(*refused.words) if refused.pattern is None else refused.pattern
    assert_message(refused.call, refused.errors, pattern)
    training.assert_as(before)
    for a, b in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    assert_goes_on(training)


def assert_goes_on(training: Training) -> None:
    if training.optimizer._state.is_swapped:
        training.optimizer.swap_ema()
    training.step(1)
    training.check()


CASES = [
    (name, route, program)
    for name, fault in FAULTS.items()
    for route in fault.tested or fault.routes
    for program in fault.programs
]


# A refused call leaves no trace, so most programs go on from one case to the next.
GO_ON = PROGRAMS.keys() - {"fresh", "fresh table", "fresh, alike", "alike, built", "swapped"}


@pytest.fixture(scope="module")
def going_on() -> dict[str, Training]:
    return {}


@pytest.mark.parametrize(("name", "route", "program"), CASES, ids=map("-".join, CASES))
def test_fault(
    name: str, route: str, program: str, tmp_path: Path, going_on: dict[str, Training]
) -> None:
    training = going_on.pop(program, None) or made(program)
    grads = training.grads()
    valid = Program(training.optimizer, training.params, grads, training.rng, tmp_path)
    refused = FAULTS[name].make(valid, route)
    files = set(tmp_path.iterdir())
    assert_refused(training, refused, grads)
    assert set(tmp_path.iterdir()) == files
    if program in GO_ON:
        going_on[program] = training


# -- settings ---------------------------------------------------------------------------------

# One bad value of each setting, for the ways that pass all settings on.
ONE_OF_EACH = {bad.name: bad for bad in BAD_VALUES}.values()
STEP_ARGUMENTS = set(inspect.signature(adam_step).parameters) - {"low_bits"}


@pytest.mark.parametrize("bad", ONE_OF_EACH, ids=str)
def test_argument_value(bad: BadValue) -> None:
    settings: dict[str, Any] = {"use_ema": True, bad.name: bad.value}
    assert_message(lambda: Adam(**settings), bad.errors, bad.pattern)
    assert_message(lambda: Adam.from_config(settings), bad.errors, bad.pattern)
    if bad.name in STEP_ARGUMENTS:
        arrays: list[Array] = [np.ones(3) for _ in range(4)]
        settings = {"ema": np.ones(3), bad.name: bad.value}
        assert_message(lambda: adam_step(*arrays, step=1, **settings), bad.errors, bad.pattern)
        assert_all_same_bits(arrays, [np.ones(3)] * 4)


# Options that exclude or need each other: those that are set, and one that is then refused.
CLASHES: list[tuple[dict[str, Any], str, Any]] = [
    ({"clipnorm": 1.0}, "clipnorm_per_tensor", 1.0),
    ({"clipnorm_per_tensor": 1.0}, "clipnorm", 1.0),
    ({}, "ema_overwrite_frequency", 2),
    ({"use_ema": False}, "ema_momentum", 0.0),
    ({"use_ema": True, "ema_momentum": 0.5}, "use_ema", False),
    ({"use_ema": True, "ema_overwrite_frequency": 2}, "use_ema", False),
]


@pytest.mark.parametrize(("options", "name", "value"), CLASHES, ids=str)
def test_option_that_clashes(options: dict[str, Any], name: str, value: Any) -> None:
    both = {**options, name: value}
    pattern = whole(rf"\b{list(both)[-1] if name == 'use_ema' else name}\b")
    assert_message(lambda: Adam(**both), ValueError, pattern)
    assert_message(lambda: Adam.from_config(both), ValueError, pattern)
    training = made(**options)
    call = partial(setattr, training.optimizer, name, value)
    assert_refused(training, Refused(call, ValueError, pattern=pattern))
    if both.keys() <= STEP_ARGUMENTS:
        arrays = [np.ones(3) for _ in range(4)]
        assert_message(lambda: adam_step(*arrays, step=1, **both), ValueError, pattern)


def test_averages_can_be_turned_off_without_their_settings() -> None:
    adam = Adam(use_ema=True, ema_overwrite_frequency=1, ema_momentum=1)
    adam.ema_overwrite_frequency, adam.ema_momentum = None, 0.99
    adam.use_ema = False


def test_option_of_the_state_may_be_set_to_what_it_is() -> None:
    adam = made("zeroing").optimizer
    for name in STRUCTURAL:
        setattr(adam, name, getattr(adam, name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("no_such_module_at_all:f", "can be imported; "), ("helpers:no", "can be imported; ")),
        *(("helpers:", "'module:function'"), (":halving", "'module:function'")),
        ("helpers:FLOATS", "real number"),
    ],
)
def test_schedule_of_a_configuration_that_cannot_be_found(name: str, said: str) -> None:
    assert_message(lambda: Adam.from_config({"lr": name}), EITHER, whole(r"\blr\b", said))


class Passing(Adam):
    """A subclass that passes unknown arguments on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        *(("nesterov", None), ("name", None), ("Lr", "lr"), ("epsilon_", "epsilon")),
        *(("clip_norm", "clipnorm"), ("beta1", "beta_1"), ("weight_decays", "weight_decay")),
        *(("learning_rte", "learning_rate"), ("\ud800", None)),
    ],
)
@pytest.mark.parametrize("kind", [Adam, Passing])
def test_unknown_keyword(kind: Any, name: str, like: str | None) -> None:
    text = f"Unexpected keyword argument passed to optimizer: {name}".replace("\ud800", r"\ud800")
    text += "" if like is None else f". Did you mean '{like}'?"
    settings = {"beta_1": 0.5, name: 1.0}
    assert_message(lambda: kind(**settings), TypeError, re.escape(text))
    assert_message(lambda: kind.from_config(settings), TypeError, re.escape(text))


@pytest.mark.parametrize("given", [((0.001,), {}), ((), {"lr": 0.001})], ids=str)
def test_lr_and_its_synonym_at_once(given: tuple[tuple[float, ...], dict[str, Any]]) -> None:
    # Refused even if the value is the default, because it was given.
    with pytest.raises(TypeError, match=r"(?s)\blr\b.*learning_rate.*Received: "):
        Adam(*given[0], **given[1], learning_rate=0.001)


# -- what has changed since the last step -------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 50), (200, 500), (50, 20), (1,), (100_000,)], ids=str)
def test_parameter_resized_in_place_since_the_last_step(shape: tuple[int, ...]) -> None:
    # The same object was checked before, perhaps even the same shape tuple, but its memory differs.
    param, adam = np.arange(1000.0).reshape(20, 50).copy(), Adam(use_ema=True)
    adam.get_updates([np.ones((20, 50))], [param])
    before = copy.deepcopy([*adam.get_weights(), *adam.ema])
    param.resize(shape, refcheck=False)
    kept = param.copy()
    with pytest.raises(ValueError, match=r"params\[0\].*\bbuild\b.*Received: .+"):
        adam.get_updates([np.ones(shape)], [param])
    with pytest.raises(ValueError, match=r"params\[0\].*\bshape\b.*Received: .+"):
        adam.swap_ema()
    assert_all_same_bits([param, *adam.get_weights(), *adam.ema], [kept, *before])
    adam.build([param])
    adam.get_updates([np.ones(shape)], [param])
    assert not np.any(param == kept)


@pytest.mark.parametrize("route", ["apply_gradients", "build"])
@pytest.mark.parametrize("program", ["built", "fresh"])
def test_excluded_array_that_is_no_parameter(program: str, route: str) -> None:
    training = made(program, weight_decay=0.5)
    params, grads = training.params, training.grads()
    training.optimizer.exclude_from_weight_decay([params[0], params[1].copy()])
    before = training.visible()
    pattern = whole(r"\bexclude_from_weight_decay\b", r"\[1\]")
    call = partial(ROUTES[route], training.optimizer, params, grads)
    assert_message(call, ValueError, pattern)
    training.assert_as(before)
    training.optimizer.exclude_from_weight_decay([])
    assert_goes_on(training)


def test_excluded_position_that_fewer_parameters_lack() -> None:
    training = Training(PLAIN, excluded=[2], weight_decay=0.5)
    training.step()
    call = partial(training.optimizer.build, training.params[:2])
    words = (r"\bexclude_from_weight_decay\b", ": 2$")
    assert_refused(training, Refused(call, ValueError, words))


# -- calls that are accepted, and the process ---------------------------------------------------


class TornPair(tuple[Array, Array]):
    """Reports a length of two but yields one element."""

    def __iter__(self) -> Iterator[Array]:
        yield self[0]


def test_pairs_that_cannot_be_unpacked() -> None:
    # Tuples are unpacked without calling their methods.
    training = made("fresh")
    for _ in range(2):
        grads = training.grads()
        pairs = list(map(TornPair, zip(grads, training.params, strict=True)))
        training.optimizer.apply_gradients(pairs)
        training.reference.step(grads)
        training.check()


def test_sparse_mode_is_a_keyword() -> None:
    apply: Any = Adam().apply_sparse
    with pytest.raises(TypeError):
        apply(np.array([0]), np.ones((1, 2)), np.ones((3, 2)), True)


@pytest.mark.parametrize("name", ["AVX9", FOREIGN[0]])
def test_unknown_forced_isa_stops_the_import(name: str) -> None:
    done = run_python("import fusedadam", environment={"FUSEDADAM_ISA": name})
    said = whole("FUSEDADAM_ISA", *fusedadam.supported_isas(), received=f".*{name}.*")
    assert re.search(f"^ImportError: {said}", done.stderr, re.MULTILINE), done.stderr
