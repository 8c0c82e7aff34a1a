# SPDX-License-Identifier: MIT
"""The state of an optimizer: copied, restored, rebuilt, freed, and frozen in part."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configurations import FORMATS, format_name, shapes_for
from fusedadam import Adam
from helpers import Array, assert_all_same_bits, assert_same_bits, halving
from training import FEW, ShapesAndDtypes, Training

# With these options, `weights` holds all state besides the parameters.
OPTIONS: dict[str, Any] = (
    {"lr": 0.01, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-6, "decay": 0.05}
    | {"weight_decay": 0.02, "l2": 0.03, "clipnorm": 3.0, "clipvalue": 0.5, "loss_scale": 4.0}
    | {"skip_nonfinite": True, "maximize": True, "flush_denormals": False}
)
# These options have more state, which copies keep as well.
EVERY: dict[str, Any] = (
    OPTIONS
    | {"amsgrad": True, "use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2}
    | {"loss_scale": "dynamic", "gradient_accumulation_steps": 3, "zero_grad": True}
)


def stepped(count: int = 3, shapes: ShapesAndDtypes = FEW, **options: Any) -> Training:
    made = Training(shapes, **options)
    made.step(count)
    return made


@pytest.fixture
def training() -> Training:
    return stepped(**OPTIONS)


# -- copies -----------------------------------------------------------------------------------


def midway() -> Training:
    """Every option on, two steps taken, one skipped, one gradient of the next mean accumulated."""
    made = Training(excluded=[1], **EVERY)
    made.step(6)
    bad = made.grads()
    bad[1][3] = np.nan
    for grads in (made.grads(), made.grads(), bad, made.grads()):
        made.call(grads)
    assert (made.optimizer.iterations, made.optimizer.skipped_steps) == (2, 1)
    return made


def rebuilt(made: Training) -> Training:
    made.optimizer.build(made.params)
    made.reference.build(made.params)
    return made


COPIED: dict[str, Callable[[], Training]] = {
    "midway": midway,
    "many options": lambda: stepped(**OPTIONS),
    "unused": lambda: Training(**EVERY),
    "built": lambda: rebuilt(Training()),
    "rebuilt": lambda: rebuilt(stepped(**OPTIONS)),
    "own settings": lambda: stepped(own={0: {"lr": 0.5}}, excluded=[0, 2], weight_decay=0.5),
    "schedule": lambda: stepped(lr=halving),
    **{
        format_name(each): partial(stepped, 3, shapes_for(each), seed=7, use_ema=True, **each)
        for each in FORMATS
    },
}


def by_pickle(protocol: int) -> Callable[[Adam], Adam]:
    return lambda optimizer: pickle.loads(pickle.dumps(optimizer, protocol))


def by_buffers(kept: Callable[[memoryview], Any]) -> Callable[[Adam], Adam]:
    """As joblib and multiprocessing's shared memory pass buffers."""

    def copied(optimizer: Adam) -> Adam:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(optimizer, 5, buffer_callback=buffers.append)
        again: Adam = pickle.loads(pickled, buffers=[kept(buffer.raw()) for buffer in buffers])
        return again

    return copied


def mapped(buffer: memoryview) -> Any:
    if not buffer.nbytes:  # an empty file cannot be mapped
        return bytes(buffer)
    with tempfile.TemporaryFile() as file:
        file.write(buffer)
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=buffer.nbytes)


COPIERS: dict[str, Callable[[Adam], Adam]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "immutable buffers": by_buffers(bytes),
    "read-only memory map": by_buffers(mapped),
    "writeable buffers": by_buffers(bytearray),
    **{f"pickle {i}": by_pickle(i) for i in range(pickle.HIGHEST_PROTOCOL + 1)},
}
FEW_COPIERS = ["deepcopy", "immutable buffers", "pickle 2", "pickle 5"]
copiers = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)


def arrays_of(optimizer: Adam) -> list[Array]:
    return [*optimizer.weights, *optimizer.ema]


@pytest.mark.parametrize(
    ("case", "copier"),
    [(c, k) for c in COPIED for k in [*(COPIERS if c == "midway" else FEW_COPIERS), "file"]],
)
def test_copy_shares_nothing_and_goes_on_with_the_same_bits(
    path: Path, case: str, copier: str
) -> None:
    training = COPIED[case]()
    original = training.optimizer
    if copier == "file":
        training = training.resumed(path)
    else:
        training.optimizer = COPIERS[copier](original)
    twin = training.optimizer
    assert twin is not original
    assert type(twin) is Adam
    assert twin.get_config() == original.get_config()
    for ours, theirs in itertools.product(arrays_of(original), arrays_of(twin)):
        assert not np.shares_memory(ours, theirs)
    original.lr = 1.0
    for _ in range(2):
        original.apply_gradients([(np.full_like(p, np.inf), p.copy()) for p in training.params])
    if case == "unused":
        assert (twin.iterations, twin.weights, twin.get_weights(), twin.ema) == (0, [], [], [])
    else:
        training.check()
    training.step(5)
    training.check()


class Named(Adam):
    """A subclass with its own constructor and attribute, which copies must keep."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = "kept"


@copiers
def test_copy_of_a_subclass(copier: Callable[[Adam], Adam]) -> None:
    original = Named(lr=0.25)
    original.get_updates([np.ones(3)], [np.ones(3)])
    twin: Any = copier(original)
    assert type(twin) is Named
    assert (twin.lr, twin.note) == (0.25, "kept")
    assert_all_same_bits(twin.weights, original.weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_holds_the_moments_but_not_the_parameters(protocol: int) -> None:
    p, g = np.random.default_rng(1).standard_normal((2, 1000))
    optimizer = Adam()
    optimizer.get_updates([g], [p])
    pickled = pickle.dumps(optimizer, protocol)
    if protocol > 2:  # protocol 2 has no bytes
        assert optimizer.weights[1].tobytes() in pickled
        assert p.tobytes() not in pickled
    moments = 2 * p.nbytes
    assert len(pickled) < (3 if protocol == 2 else 1) * moments + 4000
    assert p.tobytes() not in pickle.dumps(copy.deepcopy(optimizer), 5)
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(optimizer, 5, buffer_callback=buffers.append)) < 4000
    assert sum(buffer.raw().nbytes for buffer in buffers) == moments


# -- weights ----------------------------------------------------------------------------------


def test_weights_are_live(training: Training) -> None:
    weights = training.optimizer.weights
    training.optimizer.weights.clear()  # the list is the caller's
    training.step(2)
    assert_all_same_bits(weights[1:], training.reference.weights()[1:])
    weights[1][...] = training.reference.m[0][...] = 0.0
    training.step()
    training.check()
    kept = training.optimizer.get_weights()
    training.optimizer.build(training.params)
    training.step()
    assert_all_same_bits(weights[1:], kept[1:], "moments that the caller still holds")


def test_live_arrays_cannot_be_resized() -> None:
    adam = Adam(use_ema=True)
    p = np.ones((4, 5))
    # A parameter in another layout, to which the state is converted.
    for param in (p, np.asfortranarray(p)):
        adam.step(param, np.ones((4, 5)))
        for array in (*adam.weights[1:], *adam.ema):
            with pytest.raises(ValueError, match="does not own its data"):
                array.resize((1000, 1000), refcheck=False)
            assert isinstance(array, np.ndarray)
            assert not isinstance(array.base, np.ndarray)  # a NumPy base would not have this guard


def test_iterations_are_a_snapshot(training: Training) -> None:
    iterations = training.optimizer.weights[0]
    with pytest.raises(ValueError, match="read-only"):
        iterations[...] = 7
    training.step()
    assert_same_bits(iterations, np.array(3, dtype=np.int64))
    assert type(training.optimizer.iterations) is int


def test_get_weights_are_copies(training: Training) -> None:
    copies, before = training.optimizer.get_weights(), training.reference.weights()
    training.step()
    assert_all_same_bits(copies, before)
    for w in copies:
        w[...] = 9
    training.check()


# -- memory -----------------------------------------------------------------------------------


@copiers
def test_moments_are_aligned_apart_and_zero(copier: Callable[[Adam], Adam]) -> None:
    shapes = [(1,), (3,), (), (17, 3), (0,), (1000,), (5,)]
    params = [np.ones(s, d) for s in shapes for d in ("float32", "float64")]
    optimizer = Adam()
    optimizer.build(params)
    for each in (optimizer, copier(optimizer)):
        moments = each.weights[1:]
        for moment, p in zip(moments, params * 2, strict=True):
            assert_same_bits(moment, np.zeros_like(p))
            assert moment.flags.c_contiguous
            assert moment.flags.aligned
            assert moment.size == 0 or moment.ctypes.data % 64 == 0
        spans = sorted((w.ctypes.data, w.ctypes.data + w.nbytes) for w in moments if w.size)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


def test_nothing_is_kept_alive() -> None:
    # Freed by reference counts: gigabytes of moments must not wait for the cycle collector.
    gc.collect()
    gc.disable()
    try:
        optimizer, param = Adam(), np.ones(100_000)
        first, second = np.full(100_000, 2.0), np.full(100_000, 3.0)
        optimizer.apply_gradients([(first, param)])
        m = optimizer.get_updates([second], [param])[1]
        grads = [weakref.ref(first), weakref.ref(second)]
        del first, second
        assert [gone() for gone in grads] == [None, None]
        tail, kept = optimizer.weights[2][-10:], [m.copy(), optimizer.weights[2][-10:].copy()]
        others: list[Any] = [weakref.ref(optimizer), weakref.ref(param)]
        del optimizer, param
        assert [gone() for gone in others] == [None, None]
    finally:
        gc.enable()
    # Moments that are still referenced outlive their optimizer, and no other one writes to them.
    Adam().get_updates([np.full(100_000, 5.0)], [np.ones(100_000)])
    assert_all_same_bits([m, tail], kept)


# -- parameters without a gradient in some steps --------------------------------------------------

LARGE = [((210, 200), "float32"), ((33_000,), "float64"), ((5,), "float32")]
FROZEN: list[dict[str, Any]] = [
    {},
    {"decay": 0.5, "weight_decay": 0.1},
    {"lr": halving, "amsgrad": True, "maximize": True},
    {"clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 2},
    {"clipnorm_per_tensor": 0.1, "zero_grad": True},
    {"loss_scale": "dynamic", "bias_corrected_epsilon": True},
    {"gradient_accumulation_steps": 3, "clipvalue": 0.1},
    {"gradient_accumulation_steps": 2, "zero_grad": True, "clipnorm": 0.1, "use_ema": True},
]
# The parameters with a gradient in each call, by position modulo 3. Each call has at least one.
CALLS = [{0, 1, 2}, {0}, {1}, {1, 2}, {0, 2}, {0, 2}, {2}, {0, 1, 2}, {1}]


def call_frozen(training: Training, present: set[int], *, bad: bool = False) -> None:
    grads: list[Any] = [g if i % 3 in present else None for i, g in enumerate(training.grads())]
    if bad:
        grads[0][...] = np.inf
    training.call(grads)
    training.check()


@pytest.mark.parametrize(
    ("shapes", "options"),
    [*((FEW, options) for options in FROZEN), *((LARGE, FROZEN[i]) for i in (0, 3, 7))],
    ids=str,
)
def test_frozen_parameters_equal_oracle(path: Path, shapes: Any, options: dict[str, Any]) -> None:
    training = Training(shapes, **options)
    for i, present in enumerate(CALLS):
        # The counts of each parameter are kept.
        if shapes is FEW and i == 4:
            training = training.resumed(path)
        elif shapes is FEW and i > 4:
            training.optimizer = (copy.deepcopy, by_pickle(5))[i % 2](training.optimizer)
        call_frozen(training, present, bad=i == 4 and "loss_scale" in options)
    if training.reference.use_ema:
        training.optimizer.swap_ema()
        training.reference.swap_ema()
        training.check()


def test_constraint_of_a_frozen_parameter_is_left_alone() -> None:
    class Constrained(np.ndarray[Any, Any]):
        constraint = staticmethod(lambda p: p * 0)

    frozen, stepped = (np.ones(2).view(Constrained) for _ in range(2))
    Adam().apply_gradients([(None, frozen), (np.ones(2), stepped)])
    np.testing.assert_array_equal(frozen, 1)
    np.testing.assert_array_equal(stepped, 0)


def test_frozen_tensors() -> None:
    torch: Any = pytest.importorskip("torch", reason="the adapters' tests have it")
    frozen, stepped = torch.ones(3), torch.ones(3)
    adam = Adam(lr=0.5)
    for grads in ((None, torch.ones(3)), (torch.ones(3), torch.ones(3))):
        versions = frozen._version
        adam.apply_gradients(list(zip(grads, (frozen, stepped), strict=True)))
        assert (frozen._version > versions) == (grads[0] is not None)
    np.testing.assert_allclose(frozen.numpy(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(stepped.numpy(), 0.0, atol=1e-6)
