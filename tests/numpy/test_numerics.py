# SPDX-License-Identifier: MIT
"""Every configuration equals the oracle bit for bit: each instruction set, thread count, size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import fusedadam
import numpy as np
import oracle
import pytest
from configurations import (
    EVERYTHING,
    FORMATS,
    LARGE,
    MIXED,
    OPTIONS,
    PARALLEL,
    SIZES,
    TOGETHER,
    format_name,
    shapes_for,
)
from fresh_python import output_of
from fusedadam import adam_step
from helpers import (
    FLOATS,
    Array,
    Placed,
    assert_all_same_bits,
    assert_same_bits,
    halving,
    running,
    state,
    values,
)
from training import FEW, ShapesAndDtypes, Training

ROUTES = ("apply_gradients", "step", "get_updates")


# -- Adam -------------------------------------------------------------------------------------


def check_every_route(training: Training, dtypes: tuple[str | None, ...] = (None,)) -> None:
    """Compare calls by each method, of which the last has a NaN, and `get_gradients` before two."""
    for i in range(7):
        grads = training.grads(dtypes[i % len(dtypes)])
        if i == 6:
            grads[1].flat[0] = np.nan
        if i in (1, 6):
            kept = [g.copy() for g in grads]
            returned = training.optimizer.get_gradients(grads, training.params)
            assert_all_same_bits(returned, training.reference.gradients(grads), "get_gradients")
            assert_all_same_bits(grads, kept, "gradients after get_gradients")
        training.call_by(ROUTES[i % 3], grads)
        training.check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    check_every_route(Training(MIXED, excluded=[1, 5], **options))


HALF_GRADIENTS = (None, "float32", "bfloat16", "float16")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("formats", FORMATS, ids=format_name)
def test_storage_formats(formats: dict[str, Any]) -> None:
    training = Training(shapes_for(formats), **formats)
    training.optimizer.seed = training.reference.seed = 7
    check_every_route(training, HALF_GRADIENTS)


IN_FORMATS = [
    (options, formats)
    for formats in (
        {"moments": "packed", "low_bits": "int8"},
        {"moments": "bfloat16", "low_bits": "int16"},
        {"moments": "auto", "low_bits": None},
    )
    for options in (*OPTIONS[1:], {**EVERYTHING, "amsgrad": False})
    if not (formats["moments"] == "packed" and options.get("amsgrad"))
]


@pytest.mark.parametrize(
    ("options", "formats"), IN_FORMATS, ids=[f"{format_name(f)}-{o}" for o, f in IN_FORMATS]
)
def test_options_in_storage_formats(options: dict[str, Any], formats: dict[str, Any]) -> None:
    training = Training(shapes_for(formats), **options, **formats)
    check_every_route(training, HALF_GRADIENTS)
    for _ in range(2 if options.get("use_ema") else 0):
        training.optimizer.swap_ema()
        training.reference.swap_ema()
        training.check()


ON_THREADS: list[tuple[dict[str, Any], ShapesAndDtypes, tuple[str | None, ...]]] = [
    *((options, LARGE, (None,)) for options in [{}, *TOGETHER, {"clipnorm_per_tensor": 1.0}]),
    ({"gradient_accumulation_steps": 2, "clipnorm": 1.0}, LARGE, ("float16", "bfloat16")),
    ({"zero_grad": True, "skip_nonfinite": True}, LARGE, ("bfloat16", None, "float16")),
    ({"loss_scale": "dynamic", "clipnorm": 1.0}, LARGE, (*[None] * 3, "float16")),
    (
        {"moments": "packed", "low_bits": "int8", "clipnorm": 0.5, "use_ema": True},
        [((3, 5), "bfloat16"), ((PARALLEL,), "bfloat16")],
        ("bfloat16", None),
    ),
    ({"moments": "bfloat16"}, [((PARALLEL,), "float16"), ((1025,), "float32")], (None,)),
]


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize(
    ("options", "shapes", "dtypes"), ON_THREADS, ids=[f"{o}-{d}" for o, _, d in ON_THREADS]
)
def test_threads(
    options: dict[str, Any], shapes: ShapesAndDtypes, dtypes: tuple[str | None, ...]
) -> None:
    training = Training(shapes, excluded=[1], **options)
    for i in range(5):
        grads = training.grads(dtypes[i % len(dtypes)])
        if i == 3:  # the last element of the largest tensor
            max(grads, key=np.size).flat[-1] = -np.inf
        training.call(grads)
    training.check()
    if options.get("use_ema"):
        training.optimizer.swap_ema()
        training.reference.swap_ema()
        training.check()


def test_settings_may_change_between_steps() -> None:
    training = Training(FEW, excluded=[2], use_ema=True, gradient_accumulation_steps=2)
    changes: list[tuple[str, Any]] = [
        *(("lr", 0.5), ("beta_1", 0.3), ("beta_2", 0.4), ("epsilon", 0.1), ("decay", 0.7)),
        *(("bias_corrected_epsilon", True), ("clipnorm", 0.2), ("clipvalue", 0.01)),
        *(("weight_decay", 0.1), ("l2", 0.2), ("flush_denormals", False), ("maximize", True)),
        *(("ema_overwrite_frequency", 2), ("zero_grad", True), ("loss_scale", "dynamic")),
        *(("lr", halving), ("weight_decay", None), ("l2", 0.0), ("loss_scale", 8.0)),
        *(("clipnorm", 0), ("clipvalue", 0), ("clipnorm", None), ("clipvalue", None)),
        *(("clipnorm_per_tensor", 0.5), ("skip_nonfinite", True), ("clipnorm_per_tensor", 0.0)),
        *(("ema_momentum", 0.25), ("loss_scale", "dynamic"), ("lr", 0.125), ("loss_scale", None)),
    ]
    for name, value in changes:
        setattr(training.optimizer, name, value)
        setattr(training.reference, name, value)
        assert getattr(training.optimizer, name) == value
        training.step(2)
        training.check()


# -- adam_step --------------------------------------------------------------------------------

Lists = dict[str, list[Any]]


def check_adam_step(
    arrays: Lists, *, step: Any, offset: int = 0, alone: bool = False, **options: Any
) -> None:
    """Compare one `adam_step` with the oracle, and check the memory around all arrays.

    Each kind of array has another offset, so that no loop can align them all. If `alone`, the
    arrays are passed without lists.
    """
    low_bits = [low.dtype.name for low in arrays.get("low_bits", []) if low is not None]
    reference = oracle.OracleAdam(
        arrays["params"],
        amsgrad="vhat" in arrays,
        use_ema="ema" in arrays,
        moments="packed" if "packed" in arrays else "float32",
        low_bits=low_bits[0] if low_bits else None,
        **options,
    )
    reference.set_count(int(step) - 1)
    for name in arrays.keys() - {"params", "grads"}:
        setattr(reference, name, list(arrays[name]))
    left = reference.step(arrays["grads"])
    places = {
        name: [None if x is None else Placed(x, offset + k) for x in of]
        for k, (name, of) in enumerate(arrays.items())
    }
    given: Lists = {
        name: [None if place is None else place.array for place in of]
        for name, of in places.items()
    }
    kwargs = {name: of[0] for name, of in given.items()} if alone else given
    assert adam_step(**kwargs, step=step, **options) is None
    for name, of in given.items():
        expected = left if name == "grads" else getattr(reference, name)
        for i, (ours, theirs) in enumerate(zip(of, expected, strict=True)):
            if ours is not None:
                assert_same_bits(ours, theirs, f"{name}[{i}] at step {step}, offset {offset}")
    for place in itertools.chain(*places.values()):
        if place is not None:
            place.assert_canaries_alive()


def drawn(rng: np.random.Generator, shapes: ShapesAndDtypes, *more: str) -> Lists:
    """Draw parameters, gradients and moments as in the middle of a training, and more arrays."""
    columns = zip(*(state(rng, *of) for of in shapes), strict=True)
    arrays: Lists = dict(zip(("params", "grads", "m", "v"), map(list, columns), strict=True))
    return arrays | {name: [np.asarray(np.abs(values(rng, *of))) for of in shapes] for name in more}


def words(rng: np.random.Generator, n: int, dtype: str) -> Array:
    return np.asarray(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, n, dtype))


ONE_STEP: dict[str, Any] = {
    "lr": 0.1,
    "decay": 0.5,
    "weight_decay": 0.3,
    "l2": 0.2,
    "clipnorm": 0.7,
    **dict.fromkeys(("maximize", "zero_grad"), True),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("n", SIZES)
def test_adam_step_of_any_length_and_alignment(
    rng: np.random.Generator, n: int, offset: int
) -> None:
    for dtype in FLOATS:
        check_adam_step(drawn(rng, [((n,), dtype)]), step=7, offset=offset, alone=True)
        arrays = drawn(rng, [((n,), dtype)], "vhat", "ema")
        check_adam_step(arrays, step=3, offset=offset, alone=True, **ONE_STEP)
    for low_bits in ("int8", "int16"):
        p, g, m, v = state(rng, n, "bfloat16")
        arrays = {"params": [p], "grads": [g], "low_bits": [words(rng, n, low_bits)]}
        packed = {**arrays, "packed": [words(rng, n, "int16")], "ema": [values(rng, n, "float32")]}
        check_adam_step(packed, step=2, offset=offset, seed=3, weight_decay=0.1)
        arrays |= {"m": [m.astype("float32")], "v": [v.astype("float32")]}
        check_adam_step(arrays, step=2, offset=offset, seed=2**63 - 1)


@pytest.mark.usefixtures("isa", "threads")
def test_adam_step_of_many_tensors(rng: np.random.Generator) -> None:
    # 300 tensors, most of them shorter than a tile. The threads' shares begin inside the list.
    short = [((int(n),), FLOATS[int(n) % 2]) for n in rng.integers(0, 250, 300)]
    check_adam_step(drawn(rng, short), step=2)
    check_adam_step(drawn(rng, LARGE, "vhat"), step=5, **ONE_STEP)


@pytest.mark.parametrize("step", [1, 2, 100, np.int64(3), np.uint8(4), np.array(5)], ids=repr)
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"decay": 0.25, "lr": 0.02, "beta_1": 0.0, "beta_2": 0.0, "epsilon": 0.5}, ()),
        ({"weight_decay": 0.1, "bias_corrected_epsilon": True}, ()),
        ({"l2": 0.1, "flush_denormals": False}, ()),
        ({"clipnorm": 0.5}, ()),
        ({"clipnorm_per_tensor": 0.5}, ()),
        ({"clipvalue": 0.01, "zero_grad": True}, ()),
        ({"maximize": True}, ("vhat",)),
        ({}, ("ema",)),
        ({"ema_momentum": 0.5, "clipnorm": 0.5, "l2": 1.0}, ("vhat", "ema")),
    ],
    ids=str,
)
def test_options_of_adam_step(
    rng: np.random.Generator, options: dict[str, Any], more: tuple[str, ...], step: Any
) -> None:
    check_adam_step(drawn(rng, MIXED, *more), step=step, **options)


def test_adam_step_of_mixed_formats(rng: np.random.Generator) -> None:
    p, g, _, _ = state(rng, 70, "bfloat16")
    arrays: Lists = {
        "params": [p, p.astype("float32")],
        "grads": [g.astype("float16"), g.astype("float32")],
        "packed": [words(rng, 70, "int16") for _ in range(2)],
        "low_bits": [words(rng, 70, "int8"), None],
    }
    check_adam_step(arrays, step=4)
    check_adam_step({**arrays, "low_bits": [None, None]}, step=4)
    no_arrays: dict[str, Any] = {**arrays, "low_bits": [None, 5]}
    with pytest.raises(TypeError, match=r"^low_bits\[0\] must be"):
        adam_step(**no_arrays, step=4)
    assert adam_step([], [], [], [], step=1) is None
    adam_step(p, g, np.zeros_like(p), np.zeros_like(p), step=1, rounding="nearest")


# -- beta**t ----------------------------------------------------------------------------------

# The last step has the largest previous count that is exact in float64.
FAR = [10**6, 2**31 - 1, 2**31 + 1, 2**53 - 1, 2**53, 2**53 + 1]
POWERS: list[tuple[float, Sequence[int]]] = [
    # Within 0.001 units in the last place of the midpoint between two floats. A less precise
    # computation rounds them in the wrong direction: glibc 2.36 does so for eight of them.
    *((0.9997, [1_078]), (0.99975, [389, 572]), (0.9999, [494, 1_733, 2_258])),
    *((0.99999, [7_487, 37_114, 48_419]), (0.999999, [7_577, 114_953, 489_224])),
    *((beta, FAR) for beta in (0.999, 1 - 2**-20, 1 - 2**-31, 1 - 3 * 2**-42)),
    *((beta, FAR) for beta in (1 - 2**-50, 1 - 3 * 2**-53, 1 - 2**-53)),
    *((beta, range(1, 150)) for beta in (0.999, 0.99, 0.9, 0.5, 0.1)),
    (0.999, range(150, 20_000, 997)),
]


@pytest.mark.parametrize(("beta", "steps"), POWERS, ids=lambda x: str(x)[:20])
def test_bias_correction(rng: np.random.Generator, beta: float, steps: Sequence[int]) -> None:
    """Compare learning rates through 16 products: a wrong last bit changes nearly every one."""
    zero = np.zeros(16)
    arrays = {"params": [zero], "grads": [zero], "m": [rng.uniform(1, 2, 16)], "v": [zero]}
    for step in steps:
        for beta_1, beta_2 in ((0.5, beta), (beta, 0.5)):
            check_adam_step(arrays, step=step, lr=1.0, epsilon=1.0, beta_1=beta_1, beta_2=beta_2)


# -- the environment of a step ----------------------------------------------------------------


@pytest.mark.parametrize("count", [np.int64(1), np.uint8(3), 4096], ids=repr)
def test_thread_counts_that_are_ints(count: Any) -> None:
    with running():
        fusedadam.set_num_threads(count)
        assert fusedadam.get_num_threads() == int(count)


def test_empty_instruction_set_variable_counts_as_unset() -> None:
    code = "import fusedadam; print(fusedadam.active_isa())"
    assert output_of(code, environment={"FUSEDADAM_ISA": ""}) == fusedadam.supported_isas()[0]
