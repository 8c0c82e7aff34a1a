# SPDX-License-Identifier: MIT
"""Checkpoints: the round trip, the file, and other threads and processes."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    OPTIONS,
    SCHEDULE,
    Training,
    assert_same_state,
    names_beside,
)
from fresh_python import output_of, run_python
from fusedadam import Adam
from fusedadam.checkpoint import load as load_checkpoint
from fusedadam.snapshots import snapshot as snapshot_of
from helpers import Array, assert_all_same_bits, read_only, values
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


# -- the round trip ---------------------------------------------------------------------------

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options
@pytest.mark.parametrize("before", [0, 1, 5, 6])
def test_resumed_training_equals_one_that_never_stopped(
    path: Path, options: dict[str, Any], before: int
) -> None:
    unstopped = Training(**options)
    if "weight_decay" in options:
        unstopped.optimizer.exclude_from_weight_decay([unstopped.params[1]])
    unstopped.optimizer.build(unstopped.params)
    unstopped.step(before)
    resumed = unstopped.resumed(path)
    resumed.assert_same_as(unstopped)
    for training in (unstopped, resumed):
        training.step(8)
    resumed.assert_same_as(unstopped)
    assert resumed.optimizer.iterations > 0


def test_the_trainings_above_reach_what_is_to_be_kept() -> None:
    training = Training(**OPTIONS["everything"])
    training.optimizer.exclude_from_weight_decay([training.params[1]])
    training.step(6)
    snapshot = snapshot_of(training.optimizer)
    assert sorted(snapshot["slots"]) == ["accumulator", "ema", "m", "v", "vhat"]
    assert snapshot["progress"]["accumulated"] == 2
    assert snapshot["excluded"] == [1]
    assert training.optimizer.skipped_steps == 1
    assert training.optimizer.current_loss_scale == 2.0**14


@options
def test_optimizer_without_state(path: Path, options: dict[str, Any]) -> None:
    fresh = Training(**options)
    resumed = fresh.resumed(path)
    assert resumed.optimizer.get_config() == fresh.optimizer.get_config()
    assert resumed.optimizer.iterations == 0
    for training in (fresh, resumed):
        training.step(5)
    resumed.assert_same_as(fresh)


def test_no_parameters(path: Path) -> None:
    optimizer = Adam()
    optimizer.build([])
    optimizer.save(path)
    assert Adam.load(path, []).iterations == 0


def test_steps_over_no_parameters_are_not_those_of_others(path: Path) -> None:
    optimizer = Adam()
    optimizer.apply_gradients([])
    optimizer.save(path)
    assert Adam.load(path, []).iterations == 1
    with pytest.raises(ValueError, match=r"the state of 0\. Received: 1"):
        Adam.load(path, [np.ones(3)])


def test_special_values_keep_their_bits(path: Path) -> None:
    optimizer = Adam()
    params = [np.zeros(6, "float32"), np.zeros(6)]
    optimizer.build(params)
    for moment in optimizer.weights[1:]:
        tiny = np.finfo(moment.dtype).smallest_subnormal
        moment[...] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, tiny]
    optimizer.save(path)
    loaded = Adam.load(path, params).weights[1:]
    assert [m.tobytes() for m in loaded] == [m.tobytes() for m in optimizer.weights[1:]]


def test_what_was_set_later_is_kept(path: Path, training: Training) -> None:
    training.optimizer.lr = 0.125
    training.optimizer.beta_2 = 0.5
    loaded = training.resumed(path).optimizer
    assert (loaded.lr, loaded.beta_2) == (0.125, 0.5)


def test_lr_replaces_the_saved_one(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    assert Adam.load(path, training.params, lr=0.5).lr == 0.5
    assert Adam.load(path, training.params, lr=SCHEDULE).lr is SCHEDULE
    assert Adam.load(path, training.params, lr=0.5).iterations == 3


def test_loading_writes_to_no_parameter_and_shares_nothing(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    before = [param.copy() for param in training.params]
    loaded = [Adam.load(path, training.params) for _ in range(2)]
    assert_all_same_bits(training.params, before)
    assert_same_state(loaded[0], loaded[1])
    training.step(1)
    assert_same_state(loaded[0], loaded[1])


def test_torch_parameters(path: Path) -> None:
    torch = pytest.importorskip("torch")
    params = [torch.ones(3, requires_grad=True), torch.ones((), dtype=torch.float64)]
    optimizer = Adam()
    optimizer.apply_gradients([(np.ones(3, "float32"), params[0]), (np.ones(()), params[1])])
    optimizer.save(path)
    assert_same_state(Adam.load(path, params), optimizer)


LOOKED_AT: dict[str, Callable[[Array], Array]] = {
    "read-only": read_only,
    "in Fortran order": lambda p: np.array(p, order="F"),
    "read-only in Fortran order": lambda p: read_only(np.array(p, order="F")),
    "strided": lambda p: np.repeat(p, 2, axis=-1)[..., ::2] if p.ndim else p,
    "memory-mapped": lambda p: np.frombuffer(p.tobytes(), p.dtype).reshape(p.shape),
}


@pytest.mark.parametrize("change", LOOKED_AT.values(), ids=LOOKED_AT)
@pytest.mark.parametrize("name", ["everything", "defaults"])
def test_parameters_are_only_looked_at(
    path: Path, name: str, change: Callable[[Array], Array]
) -> None:
    unstopped = Training(**OPTIONS[name])
    unstopped.step(6)
    resumed = unstopped.resumed(path)
    lr = OPTIONS[name].get("lr")
    looked_at = [change(p) for p in resumed.params]
    resumed.optimizer = Adam.load(path, looked_at, lr=lr)
    resumed.assert_same_as(unstopped)
    for training in (unstopped, resumed):
        training.step(8)
    resumed.assert_same_as(unstopped)
    # Parameters that are not writeable are refused.
    if not looked_at[0].flags.writeable:
        fresh = Adam.load(path, looked_at, lr=lr)
        with pytest.raises(ValueError, match=r"params\[0\] must be writeable"):
            fresh.apply_gradients([(np.ones_like(p), p) for p in looked_at])


def test_parameters_may_be_nested(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    a, b, c, d = training.params
    for nested in ({"a": a, "b": [b, (c, d)]}, (a, b, c, d), iter(training.params)):
        assert_same_state(Adam.load(path, nested), training.optimizer)
    only = Adam()
    only.build(a)
    only.save(path)
    assert_same_state(Adam.load(path, a), only)


class Step:
    """A schedule that is an instance of a class."""

    def __call__(self, iterations: int) -> float:
        return 0.5**iterations


NAMELESS: dict[str, Callable[[int], float]] = {
    "lambda": lambda iterations: 0.5**iterations,
    "partial": functools.partial(pow, 0.5),
    "instance": Step(),
    "method": Step().__call__,
}


@pytest.mark.parametrize("schedule", NAMELESS.values(), ids=NAMELESS)
@pytest.mark.parametrize("by", ["lr", "learning_rate"])
def test_schedule_without_a_name_is_saved(path: Path, schedule: Any, by: str) -> None:
    unstopped = Training(lr=schedule)
    unstopped.step(3)
    unstopped.optimizer.save(path)
    resumed = copy.copy(unstopped)
    resumed.params = [param.copy() for param in unstopped.params]
    with pytest.raises(ValueError, match="lr must be given as a callable"):
        Adam.load(path, resumed.params)
    with pytest.raises(TypeError, match="the same argument"):
        Adam.load(path, resumed.params, lr=schedule, learning_rate=schedule)
    resumed.optimizer = Adam.load(path, resumed.params, **{by: schedule})
    assert resumed.optimizer.lr is schedule
    resumed.assert_same_as(unstopped)
    for _ in range(3):
        for training in (unstopped, resumed):
            rng = np.random.default_rng(training.optimizer.iterations)
            grads = [values(rng, p.shape, str(p.dtype)) for p in training.params]
            training.optimizer.apply_gradients(list(zip(grads, training.params, strict=True)))
    resumed.assert_same_as(unstopped)


@pytest.mark.parametrize("method", ["exclude_from_weight_decay", "override"])
def test_parameters_still_to_be_found_are_not_saved(
    path: Path, training: Training, method: str
) -> None:
    getattr(training.optimizer, method)(training.params[:2])
    with pytest.raises(ValueError, match=rf"{method}.*before save\. .*Received: 2 parameters"):
        training.optimizer.save(path)
    assert names_beside(path) == []
    training.step(1)
    training.optimizer.save(path)
    assert_same_state(Adam.load(path, training.params), training.optimizer)


class Named(Adam):
    """A user's subclass."""


def test_subclass(path: Path) -> None:
    Named().save(path)
    assert type(Named.load(path, [])) is Named
    with pytest.raises(ValueError, match="of an optimizer 'Named', not of 'Adam'"):
        Adam.load(path, [])


# -- the file ---------------------------------------------------------------------------------


def test_the_file_is_as_documented(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert set(metadata) == {"format", "version", "optimizer", "config", "progress", "excluded"}
    assert (metadata["format"], metadata["version"]) == ("fusedadam", "1")
    assert metadata["optimizer"] == "Adam"
    assert json.loads(metadata["config"]) == training.optimizer.get_config()
    assert json.loads(metadata["progress"])["iterations"] == 3
    assert names == {f"{kind}.{i}" for kind in ("m", "v", "vhat") for i in range(4)}
    assert_all_same_bits([load_file(path)["vhat.1"]], [training.optimizer.weights[-3]])


def test_the_same_state_gives_the_same_bytes(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    first = path.read_bytes()
    Adam.load(path, training.params).save(path)
    assert path.read_bytes() == first


def test_arrays_in_the_file_are_in_c_order(path: Path) -> None:
    param = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    optimizer = Adam()
    optimizer.apply_gradients([(param.copy(), param)])
    optimizer.save(path)
    assert_all_same_bits([load_file(path)[f"{k}.0"] for k in "mv"], optimizer.weights[1:])


def test_the_file_with_counts_and_settings_of_parameters_is_as_documented(
    path: Path, training: Training
) -> None:
    grads = [np.ones_like(p) for p in training.params]
    training.optimizer.override(training.params[1:3], lr=0.5, weight_decay=None)
    training.optimizer.apply_gradients(
        [
            (None if i == 2 else g, p)
            for i, (g, p) in enumerate(zip(grads, training.params, strict=True))
        ]
    )
    training.optimizer.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["version"] == "2"
    assert json.loads(metadata["own"]) == {
        "steps": [4, 4, 3, 4],
        "overrides": [[[1, 2], {"lr": 0.5, "weight_decay": None}]],
    }
    assert_same_state(Adam.load(path, training.params), training.optimizer)


def test_arrays_in_the_file_are_aligned_to_their_elements(path: Path) -> None:
    optimizer = Adam(amsgrad=True)
    optimizer.build([np.ones(3, "float32"), np.ones(2), np.ones((2, 2), "float32"), np.ones(())])
    optimizer.save(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            size = {"F32": 4, "F64": 8}[entry["dtype"]]
            assert (start + entry["data_offsets"][0]) % size == 0


def test_file_that_the_safetensors_library_wrote_again_loads(
    path: Path, training: Training
) -> None:
    training.optimizer.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata)
    assert_same_state(Adam.load(path, training.params), training.optimizer)


def test_neither_saving_nor_loading_copies_the_whole_state(path: Path) -> None:
    params = [np.ones(250_000, "float32") for _ in range(8)]  # 1 MB each
    optimizer = Adam()
    optimizer.build(params)

    def peak(act: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            act()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: optimizer.save(path)) < 300_000
    # Excludes the new state, which the core allocates.
    assert peak(lambda: Adam.load(path, params)) < 3_000_000


# -- parameters and lr that do not match ------------------------------------------------------


UNFIT: dict[str, tuple[Callable[[list[Array]], Any], type[Exception], str]] = {
    "fewer": (lambda p: p[:3], ValueError, "must be as many .* the state of 4. Received: 3"),
    "none": (lambda _: [], ValueError, "must be as many .* the state of 4. Received: 0"),
    "more": (lambda p: [*p, np.ones(2)], ValueError, "the state of 4. Received: 5"),
    "reversed": (lambda p: p[::-1], ValueError, "params.0. must have the shape of m.0"),
    "transposed": (lambda p: [p[0].T, *p[1:]], ValueError, "params.0. must have the shape of m.0"),
    "wider": (lambda p: [p[0].astype("f8"), *p[1:]], ValueError, "params.0. must have the dtype"),
    "swapped bytes": (lambda p: [p[0].astype(">f4")], TypeError, "params.0. must be float32"),
    "integers": (lambda p: [p[0].astype("i2")], TypeError, "params.0. must be float32"),
    "lists": (
        lambda p: [p[0].tolist()],
        TypeError,
        r"params\[0\]\[0\]\[0\] must be a numpy.ndarray",
    ),
    "masked": (lambda p: [np.ma.array(p[0]), *p[1:]], TypeError, "params.0. must have no mask"),
    "an array": (lambda p: p[0], ValueError, "must be as many .* the state of 4. Received: 1"),
    "a dict in another order": (
        lambda p: {"a": p[1], "b": p[0], "c": p[2], "d": p[3]},
        ValueError,
        r"params\['a'\] must have the shape of m.0",
    ),
    "None": (lambda _: None, TypeError, "params must be a list or tuple"),
}


@pytest.mark.parametrize(("change", "error", "reason"), UNFIT.values(), ids=UNFIT)
def test_parameters_that_do_not_fit(
    path: Path,
    training: Training,
    change: Callable[[list[Array]], Any],
    error: type[Exception],
    reason: str,
) -> None:
    training.optimizer.save(path)
    with pytest.raises(error, match=reason):
        Adam.load(path, change(training.params))


@pytest.mark.parametrize(
    ("lr", "error"),
    [("0.1", TypeError), ("math:erf", TypeError), ([0.1], TypeError), (-1.0, ValueError)],
)
def test_lr_is_checked(path: Path, training: Training, lr: Any, error: type[Exception]) -> None:
    training.optimizer.save(path)
    # The message must not blame the file.
    with pytest.raises(error, match=r"^(lr|learning_rate) must be"):
        Adam.load(path, training.params, lr=lr)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_saved_schedule_must_be_given_again(path: Path, lr: Any) -> None:
    training = Training(lr=SCHEDULE)
    training.step(2)
    training.optimizer.save(path)
    with pytest.raises(ValueError, match=r"lr must be given as a callable .* 'math:erf'"):
        Adam.load(path, training.params, lr=lr)
    assert Adam.load(path, training.params, lr=SCHEDULE).iterations == 2


# -- other threads and processes --------------------------------------------------------------


def test_save_during_steps_of_another_thread_is_of_one_step(path: Path) -> None:
    params = [np.ones(5000, "float32"), np.ones(3)]
    grads = [np.ones(5000, "float32"), np.ones(3)]
    optimizer = Adam()
    optimizer.build(params)
    stop = threading.Event()

    def step() -> None:
        while not stop.is_set():
            optimizer.apply_gradients(list(zip(grads, params, strict=True)))

    thread = threading.Thread(target=step)
    thread.start()
    found = []
    try:
        for _ in range(20):
            optimizer.save(path)
            found.append(Adam.load(path, params).get_weights())
    finally:
        stop.set()
        thread.join()
    expected = Adam()
    others = [param.copy() for param in params]
    expected.build(others)
    for weights in found:
        while expected.iterations < weights[0]:
            expected.apply_gradients(list(zip(grads, others, strict=True)))
        assert_all_same_bits(weights, expected.get_weights())


@forks
def test_temporary_files_of_the_dead_are_removed_and_of_the_living_are_not(path: Path) -> None:
    import fcntl

    def beside(name: str) -> Path:
        return path.with_name(name)

    living = beside(f".{path.name}.00000000000000aa.tmp")
    dead = beside(f".{path.name}.00000000000000bb.tmp")
    others = [
        beside(".adam.0123456789abcdef.tmp"),
        beside(f".{path.name}.tmp"),
        beside(f".{path.name}.0123456789abcde.tmp"),
        beside(f".{path.name}.0123456789abcdef"),
        beside(f"{path.name}.0123456789abcdef.tmp"),
        beside(f".{path.name}.0123456789abcdefg.tmp"),
        beside("0123456789abcdef"),
    ]
    for file in (living, dead, *others):
        file.touch()
    (link := beside(f".{path.name}.00000000000000cc.tmp")).symlink_to(others[0])
    (directory := beside(f".{path.name}.00000000000000dd.tmp")).mkdir()
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Adam().save(path)
        kept = [path, living, link, directory, *others]
        assert names_beside(path) == sorted(file.name for file in kept)
    Adam().save(path)
    kept.remove(living)
    assert names_beside(path) == sorted(file.name for file in kept)


# Single-threaded, so that the process may fork.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@forks
def test_several_processes_save_to_one_path(path: Path) -> None:
    code = f"from crash import *; save_at_once(Path({str(path)!r}), writers=4, saves=100)"
    assert output_of(code, environment=ONE_THREAD) == ""
    assert names_beside(path) == [path.name]


@forks
def test_kill_at_any_instant_leaves_a_whole_file(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = os.environ.get("FUSEDADAM_KILLS")
    kills = int(asked or "300")
    code = f"""
        import json
        from crash import *
        print(json.dumps(kill_savers(Path({str(path)!r}), kills={kills}, seed=1)))
    """
    # With coverage measurement, a fork that is measured too would take longer than a save.
    environment = ONE_THREAD | {"COVERAGE_PROCESS_CONFIG": ""}
    done = run_python(code, environment=environment, time_limit=60 + kills)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    if asked:
        with capsys.disabled():
            sys.stdout.write(
                f"\n{kills:,} savers killed, {seen['unfinished']:,} of them in the middle of a save, "
                f"{seen['last']:,} states saved; none lost, none torn\n"
            )
    # Some kills must interrupt a save, and some saves must finish in between.
    assert seen["unfinished"] > kills / 10
    assert seen["last"] > kills / 20
    # Each save removes what the last kill left behind.
    assert seen["most_left"] == 1
    params = [np.ones(2)]
    optimizer = Adam()
    optimizer.build(params)
    optimizer.save(path)
    assert names_beside(path) == [path.name]


def test_load_is_for_any_optimizer(path: Path) -> None:
    Adam(lr=0.5).save(path)
    loaded: Adam = load_checkpoint(Adam, path, [np.ones(2)])
    assert loaded.lr == 0.5


def test_gradients_accumulated_without_parameters_fit_no_others(tmp_path: Path) -> None:
    adam = Adam(gradient_accumulation_steps=2)
    adam.apply_gradients([])
    adam.save(tmp_path / "adam")
    # Otherwise the next step would be half of what it should be.
    with pytest.raises(ValueError, match=r"has the state of 0\. Received: 1"):
        Adam.load(tmp_path / "adam", [np.ones(2)])
