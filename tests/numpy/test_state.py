# SPDX-License-Identifier: MIT
"""The state of an optimizer: saved, copied, restored, rebuilt, and freed."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from fusedadam import Adam
from helpers import Array, assert_all_same_bits, assert_same_bits, halving, values
from training import FEW, Training

# With these options, `weights` holds all state besides the parameters.
OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "beta_1": 0.8,
    "beta_2": 0.99,
    "epsilon": 1e-6,
    "decay": 0.05,
    "weight_decay": 0.02,
    "l2": 0.03,
    "clipnorm": 3.0,
    "clipvalue": 0.5,
    "loss_scale": 4.0,
    "skip_nonfinite": True,
    "maximize": True,
    "flush_denormals": False,
}
# These options have more state, which copies keep as well.
EVERY: dict[str, Any] = {
    **OPTIONS,
    "amsgrad": True,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 2,
    "loss_scale": "dynamic",
    "gradient_accumulation_steps": 3,
    "zero_grad": True,
}
Copier = Callable[[Adam], Adam]
COPIERS: dict[str, Copier] = {
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda o, protocol=protocol: pickle.loads(pickle.dumps(o, protocol))  # type: ignore[misc]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    # As joblib and multiprocessing's shared memory pass buffers.
    "immutable buffers": lambda o: by_buffers(o, bytes),
    "read-only memory map": lambda o: by_buffers(o, mapped),
    "writeable buffers": lambda o: by_buffers(o, bytearray),
}


def by_buffers(optimizer: Adam, kept: Callable[[memoryview], Any]) -> Adam:
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(optimizer, 5, buffer_callback=buffers.append)
    again: Adam = pickle.loads(pickled, buffers=[kept(buffer.raw()) for buffer in buffers])
    return again


def mapped(buffer: memoryview) -> Any:
    if not buffer.nbytes:  # an empty file cannot be mapped
        return bytes(buffer)
    with tempfile.TemporaryFile() as file:
        file.write(buffer)
        file.flush()
        return np.memmap(file, np.uint8, "r", shape=buffer.nbytes)


copiers = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)


@pytest.fixture
def training() -> Training:
    made = Training(**OPTIONS)
    made.step(3)
    return made


@pytest.fixture
def midway() -> Training:
    """Every option on, two steps taken, one skipped, one gradient of the next mean accumulated."""
    made = Training(excluded=[1], **EVERY)
    made.step(6)
    bad = made.grads()
    bad[1][3] = np.nan
    for grads in (made.grads(), made.grads(), bad, made.grads()):
        made.call(grads)
    assert (made.optimizer.iterations, made.optimizer.skipped_steps) == (2, 1)
    made.check()
    return made


# -- copies -----------------------------------------------------------------------------------


def check_copy_goes_on(training: Training, copier: Copier) -> None:
    original = training.optimizer
    training.optimizer = copier(original)
    assert training.optimizer is not original
    assert type(training.optimizer) is Adam
    assert training.optimizer.get_config() == original.get_config()
    training.check()
    training.step(5)
    training.check()


@copiers
@pytest.mark.parametrize("options", [EVERY, OPTIONS, {}], ids=["every option", "many", "defaults"])
def test_copy_goes_on_with_the_same_bits(copier: Copier, options: dict[str, Any]) -> None:
    training = Training(**options)
    training.step(3)
    check_copy_goes_on(training, copier)


@copiers
def test_copy_in_the_middle_of_a_mean_goes_on_with_the_same_bits(
    midway: Training, copier: Copier
) -> None:
    check_copy_goes_on(midway, copier)


def arrays_of(optimizer: Adam) -> list[Array]:
    return [*optimizer.weights, *optimizer.ema]


@copiers
def test_copy_shares_nothing(midway: Training, copier: Copier) -> None:
    twin = copier(midway.optimizer)
    for ours, theirs in itertools.product(arrays_of(midway.optimizer), arrays_of(twin)):
        assert not np.shares_memory(ours, theirs)
    before = [a.copy() for a in arrays_of(twin)]
    config, scale = twin.get_config(), twin.current_loss_scale
    for _ in range(2):
        midway.step()
        midway.call([np.full_like(g, np.inf) for g in midway.grads()])
    midway.optimizer.lr = 1.0
    assert_all_same_bits(arrays_of(twin), before)
    assert (twin.iterations, twin.skipped_steps, twin.current_loss_scale) == (2, 1, scale)
    assert twin.get_config() == config


@copiers
def test_copy_of_an_unused_optimizer(copier: Copier) -> None:
    twin = copier(Adam(**EVERY))
    assert twin.get_config() == Adam(**EVERY).get_config()
    assert (twin.iterations, twin.weights, twin.get_weights(), twin.ema) == (0, [], [], [])
    training = Training(**EVERY)
    training.optimizer = twin
    training.step(4)
    training.check()


@copiers
def test_copy_remembers_which_parameters_do_not_decay(copier: Copier) -> None:
    training = Training(excluded=[0, 2], weight_decay=0.5, l2=0.5)
    training.step()
    check_copy_goes_on(training, copier)


@copiers
def test_copy_of_a_schedule_by_its_name(copier: Copier) -> None:
    training = Training(lr=halving)
    training.step()
    check_copy_goes_on(training, copier)
    assert training.optimizer.lr is halving


@copiers
def test_copy_keeps_what_was_set_later(midway: Training, copier: Copier) -> None:
    changes: dict[str, Any] = {
        "lr": 0.125,
        "clipnorm": None,
        "clipnorm_per_tensor": 0.5,
        "decay": 0.0,
        "weight_decay": None,
        "l2": 1.0,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": None,
        "loss_scale": 8.0,
        "skip_nonfinite": False,
        "zero_grad": False,
        "maximize": False,
    }
    for name, value in changes.items():
        setattr(midway.optimizer, name, value)
    twin = copier(midway.optimizer)
    assert {name: getattr(twin, name) for name in changes} == changes


class Named(Adam):
    """A subclass with its own attributes, which copies must keep."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@copiers
def test_copy_of_a_subclass(copier: Copier) -> None:
    original = Named(lr=0.25)
    original.get_updates([np.ones(3)], [np.ones(3)])
    twin = copier(original)
    assert type(twin) is Named
    assert twin.lr == 0.25
    assert_all_same_bits(twin.weights, original.weights)


def test_copy_keeps_iterations_without_moments(training: Training) -> None:
    # After build and before the first step, there are moments but no steps. After a later build,
    # there is a count but moments are new.
    built = Adam()
    built.build(training.params)
    for optimizer, iterations in ((built, 0), (training.optimizer, 3)):
        optimizer.build(training.params)
        twin = copy.deepcopy(optimizer)
        assert twin.iterations == iterations
        assert_all_same_bits(twin.weights, optimizer.weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_holds_the_moments_but_not_the_parameters(protocol: int) -> None:
    rng = np.random.default_rng(1)
    p, g = rng.standard_normal((2, 1000))
    optimizer = Adam()
    optimizer.get_updates([g], [p])
    pickled = pickle.dumps(optimizer, protocol)
    if protocol > 2:  # protocol 2 has no bytes
        assert optimizer.weights[1].tobytes() in pickled
        assert p.tobytes() not in pickled
    twice = 2 * 8 * 1000
    assert len(pickled) < (3 if protocol == 2 else 1) * twice + 4000
    assert p.tobytes() not in pickle.dumps(copy.deepcopy(optimizer), 5)


def test_pickle_out_of_band_keeps_the_moments_out_of_the_pickle() -> None:
    optimizer = Adam()
    optimizer.build([np.ones(100_000)])
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(optimizer, 5, buffer_callback=buffers.append)
    assert len(pickled) < 4000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 2 * 8 * 100_000


# -- weights ----------------------------------------------------------------------------------


def test_weights_are_live(training: Training) -> None:
    weights = training.optimizer.weights
    training.step(2)
    assert_all_same_bits(weights[1:], training.reference.weights()[1:])
    assert all(w.flags.writeable for w in weights[1:])
    weights[1][...] = 0.0
    training.reference.m[0][...] = 0.0
    training.step()
    training.check()


def test_live_arrays_cannot_be_resized() -> None:
    adam = Adam(use_ema=True)
    p = np.ones((4, 5))
    adam.step(p, np.ones((4, 5)))
    # A parameter in another layout, to which the state is converted.
    for param in (p, np.asfortranarray(p)):
        adam.step(param, np.ones((4, 5)))
        for array in (*adam.weights[1:], *adam.ema):
            with pytest.raises(ValueError, match="does not own its data"):
                array.resize((1000, 1000), refcheck=False)
            assert isinstance(array, np.ndarray)
            assert not isinstance(array.base, np.ndarray)  # a NumPy base would not have this guard


def test_iterations_in_weights_are_a_snapshot(training: Training) -> None:
    iterations = training.optimizer.weights[0]
    assert_same_bits(iterations, np.array(3, dtype=np.int64))
    with pytest.raises(ValueError, match="read-only"):
        iterations[...] = 7
    training.step()
    assert iterations == 3
    assert training.optimizer.weights[0] == 4
    assert type(training.optimizer.iterations) is int


def test_weights_list_is_the_callers(training: Training) -> None:
    training.optimizer.weights.clear()
    training.check()


def test_get_weights_are_copies(training: Training) -> None:
    copies, before = training.optimizer.get_weights(), training.reference.weights()
    for ours, live in itertools.product(copies, training.optimizer.weights):
        assert not np.shares_memory(ours, live)
    assert all(isinstance(w, np.ndarray) for w in copies)
    training.step()
    assert_all_same_bits(copies, before)
    for w in copies:
        w[...] = 9
    training.check()


def test_weights_before_the_first_step() -> None:
    optimizer = Adam()
    assert (optimizer.weights, optimizer.get_weights()) == ([], [])
    p = np.ones((2, 3), "float32")
    optimizer.build([p])
    zeros = np.zeros((2, 3), "float32")
    assert_all_same_bits(optimizer.weights, [np.array(0, dtype=np.int64), zeros, zeros])
    assert_same_bits(p, np.ones((2, 3), "float32"))


def test_get_gradients_creates_no_weights() -> None:
    optimizer = Adam(clipnorm=1.0)
    optimizer.get_gradients([np.ones(3)], [np.ones(3)])
    assert optimizer.weights == []
    assert optimizer.iterations == 0


def test_set_weights_is_the_inverse_of_get_weights(training: Training) -> None:
    saved, params = training.optimizer.get_weights(), [p.copy() for p in training.params]
    live = training.optimizer.weights
    expected = copy.deepcopy(training.reference)
    training.step(4)
    training.optimizer.set_weights(saved)
    assert_all_same_bits(training.optimizer.get_weights(), saved)
    assert_all_same_bits(live[1:], saved[1:], "arrays that were live before set_weights")
    for p, old in zip(training.params, params, strict=True):
        p[...] = old
    training.reference = expected
    training.step(2)
    training.check()


def as_saved(w: list[Array]) -> list[Array]:
    return w


@pytest.mark.parametrize(
    "form",
    [
        as_saved,
        tuple,
        lambda w: [int(w[0]), *w[1:]],
        lambda w: [np.int32(w[0]), *w[1:]],
        lambda w: [w[0], np.asfortranarray(w[1]), *w[2:]],
        lambda w: [w[0], *(a[..., None][..., 0] for a in w[1:])],
        lambda w: [*w, *(np.zeros(1) for _ in FEW)],
        lambda w: [*w, *(np.zeros(1, "float32") for _ in FEW)],
    ],
    ids=["list", "tuple", "int", "int32", "Fortran", "views", "3n+1 float64", "3n+1 float32"],
)
def test_weights_as_they_may_be_given(training: Training, form: Callable[[Any], Any]) -> None:
    weights = training.optimizer.get_weights()
    restored = Adam(**OPTIONS)
    restored.build(training.params)
    restored.set_weights(form(weights))
    assert_all_same_bits(restored.weights, weights)
    training.optimizer = restored
    training.step(2)
    training.check()


def test_set_weights_copies(training: Training) -> None:
    given = [w + 1 for w in training.optimizer.get_weights()]
    given = [np.asarray(w) for w in given]
    kept = [w.copy() for w in given]
    training.optimizer.set_weights(given)
    for w in given[1:]:
        w[...] = 0
    assert_all_same_bits(training.optimizer.weights, kept)


def test_set_weights_from_its_own_live_arrays(training: Training) -> None:
    before = training.optimizer.get_weights()
    training.optimizer.set_weights(training.optimizer.weights)
    assert_all_same_bits(training.optimizer.weights, before)
    # Source and destination are the same arrays in another order.
    iterations, m, v = before[0], before[1:5], before[5:]
    live = training.optimizer.weights
    training.optimizer.set_weights([live[0], *live[5:], *live[1:5]])
    assert_all_same_bits(training.optimizer.weights, [iterations, *v, *m])


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_training_resumed_from_a_file(tmp_path: Path, steps: int) -> None:
    whole, halved = Training(**OPTIONS), Training(**OPTIONS)
    whole.step(steps + 5)
    halved.step(steps)
    np.savez(tmp_path / "weights.npz", *halved.optimizer.get_weights())
    config = halved.optimizer.get_config()
    halved.optimizer = Adam.from_config(config)
    halved.optimizer.build(halved.params)
    with np.load(tmp_path / "weights.npz") as saved:
        halved.optimizer.set_weights([saved[name] for name in saved.files])
    halved.step(5)
    halved.check()
    assert_all_same_bits(halved.params, whole.params)


# -- build ------------------------------------------------------------------------------------


def test_build_again_keeps_counting_and_starts_new_moments(training: Training) -> None:
    training.optimizer.build(training.params)
    assert training.optimizer.iterations == 3
    training.reference.build(training.params)
    training.check()
    training.step(2)
    training.check()


def test_build_for_other_parameters(rng: np.random.Generator, training: Training) -> None:
    old = training.optimizer.weights
    kept = [w.copy() for w in old]
    p = values(rng, (4, 4), "float64")
    training.optimizer.build([p])
    reference = oracle.OracleAdam([p], **OPTIONS)
    reference.iterations = 3
    for _ in range(2):
        g = values(rng, (4, 4), "float64")
        reference.step([g])
        training.optimizer.apply_gradients([(g, p)])
    assert_all_same_bits([p], reference.params)
    assert_all_same_bits(training.optimizer.weights, reference.weights())
    assert_all_same_bits(old, kept, "moments that the caller still holds")


# -- memory -----------------------------------------------------------------------------------


@copiers
def test_moments_are_aligned_apart_and_zero(copier: Copier) -> None:
    shapes = [(1,), (3,), (), (17, 3), (0,), (1000,), (5,)]
    params = [np.ones(s, d) for s in shapes for d in ("float32", "float64")]
    optimizer = Adam()
    optimizer.build(params)
    for each in (optimizer, copier(optimizer)):
        moments = each.weights[1:]
        assert len(moments) == 2 * len(params)
        for moment, p in zip(moments, params * 2, strict=True):
            assert_same_bits(moment, np.zeros_like(p))
            assert moment.flags.c_contiguous
            assert moment.flags.aligned
            assert moment.size == 0 or moment.ctypes.data % 64 == 0
        spans = sorted((w.ctypes.data, w.ctypes.data + w.nbytes) for w in moments if w.size)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


def test_optimizer_is_freed_when_it_goes_out_of_scope(training: Training) -> None:
    # Freed by its reference count: gigabytes of moments must not wait for the cycle collector.
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(training.optimizer)
        del training.optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_moments_outlive_their_optimizer() -> None:
    optimizer = Adam()
    optimizer.get_updates([np.full(100_000, 2.0)], [np.ones(100_000)])
    updates = optimizer.get_updates([np.full(100_000, 2.0)], [np.ones(100_000)])
    m, kept = updates[1], updates[1].copy()
    tail = optimizer.weights[2][-10:]
    kept_tail = tail.copy()
    del optimizer, updates
    gc.collect()
    other = Adam()
    other.get_updates([np.full(100_000, 5.0)], [np.ones(100_000)])
    assert_same_bits(m, kept)
    assert_same_bits(tail, kept_tail)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["new optimizer", "build again", "deepcopy"])
def test_memory_of_moments_is_given_back(way: str) -> None:
    p, g = np.ones(1_000_000), np.ones(1_000_000)  # 16 MB of moments
    optimizer = Adam()

    def again() -> None:
        nonlocal optimizer
        if way == "new optimizer":
            optimizer = Adam()
        elif way == "deepcopy":
            optimizer = copy.deepcopy(optimizer)
        else:
            optimizer.build([p])
        optimizer.get_updates([g], [p])

    for _ in range(3):
        again()
    before = resident_bytes()
    for _ in range(20):
        again()
    assert resident_bytes() - before < 5 * 16_000_000


# -- repr -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        OPTIONS,
        EVERY,
        {"lr": 1 / 3, "beta_1": 0.1 + 0.2},
        {"clipnorm": 0.1},
        {"clipvalue": 5e-324},
        {"flush_denormals": False},
    ],
    ids=str,
)
def test_repr_shows_the_configuration(options: dict[str, Any]) -> None:
    optimizer = Adam(**options)
    text = repr(optimizer)
    for name, value in optimizer.get_config().items():
        assert f"{name}={value!r}" in text
    again = eval(text, {"Adam": Adam})
    assert type(again) is Adam
    assert again.get_config() == optimizer.get_config()
    assert repr(again) == text


def test_repr_follows_what_is_set() -> None:
    optimizer = Adam()
    optimizer.learning_rate = 0.125
    optimizer.clipvalue = 0.5
    assert "lr=0.125" in repr(optimizer)
    assert "clipvalue=0.5" in repr(optimizer)
    assert repr(Named()).startswith("Named(")


# -- a refused call keeps the bound parameters --------------------------------------------------


def test_refused_step_does_not_change_what_swap_ema_exchanges() -> None:
    a, b = np.ones(3), np.full(3, 7.0)
    optimizer = Adam(use_ema=True)
    optimizer.apply_gradients([(np.ones(3), a)])
    average = optimizer.ema[0].copy()
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        optimizer.apply_gradients([(np.ones(2), b)])
    optimizer.swap_ema()
    np.testing.assert_array_equal(a, average)
    np.testing.assert_array_equal(b, np.full(3, 7.0))


def test_refused_swap_can_be_made_when_the_array_is_writeable_again() -> None:
    p = np.ones(3)
    optimizer = Adam(use_ema=True)
    optimizer.apply_gradients([(np.ones(3), p)])
    before = p.copy()
    optimizer.swap_ema()
    p.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        optimizer.swap_ema()
    p.flags.writeable = True
    optimizer.swap_ema()
    np.testing.assert_array_equal(p, before)


def test_no_parameters_can_be_swapped() -> None:
    optimizer = Adam(use_ema=True)
    optimizer.build([])
    optimizer.swap_ema()
