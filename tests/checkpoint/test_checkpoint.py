# SPDX-License-Identifier: MIT
"""Checkpoints: the round trip, the file, and processes that save at once or are killed."""

from __future__ import annotations

import functools
import json
import logging
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import metadata_of, names_beside
from configurations import OPTIONS
from fresh_python import NO_COVERAGE, output_of, run_python
from fusedadam import Adam
from fusedadam.checkpoint import load as load_checkpoint
from helpers import Array, assert_all_same_bits, halving, read_only
from safetensors.numpy import load_file, save_file
from training import Training

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# -- the round trip ---------------------------------------------------------------------------

# A schedule, and settings of single parameters, beside the options of all tests.
OWN: dict[str, Any] = (
    {"lr": halving, "weight_decay": 0.01, "loss_scale": "dynamic", "clipvalue": 0.5}
    | {"gradient_accumulation_steps": 4, "excluded": [1]}
    | {"own": {2: {"lr": 0.5, "weight_decay": None}, 0: {"clipvalue": 0.25}}}
)


def trained(calls: int, **options: Any) -> Training:
    """A training of which the fourth call has an infinity, and the last freezes a parameter."""
    training = Training(**options)
    training.optimizer.build(training.params)
    for call in range(1, calls + 1):
        grads: list[Array | None] = [*training.grads()]
        if call == 4 and ("skip_nonfinite" in options or options.get("loss_scale") == "dynamic"):
            grads[0] = np.full_like(training.params[0], np.inf)
        if call == calls:
            grads[2] = None
        training.call(grads)
    return training


@pytest.mark.parametrize("before", ["not built", 0, 1, 6])
@pytest.mark.parametrize("options", [*OPTIONS, OWN], ids=str)
def test_resumed_training_equals_one_that_never_stopped(
    path: Path, options: dict[str, Any], before: Any
) -> None:
    if before == "not built":
        # Settings of parameters that were not looked up are refused, below.
        left_out = ("excluded", "own")
        training = Training(**{k: v for k, v in options.items() if k not in left_out})
    else:
        training = trained(before, **options)
    resumed = training.resumed(path)
    assert resumed.optimizer.get_config() == training.optimizer.get_config()
    if before != "not built":
        resumed.check()
        kept = resumed.optimizer.weights
        assert not any(map(np.shares_memory, kept[1:], training.optimizer.weights[1:]))
    resumed.step(8)
    resumed.check()
    if options is OWN and before == 6:
        assert training.reference.accumulated == 2
        assert training.optimizer.skipped_steps == 1
        assert training.optimizer.current_loss_scale == 2.0**14


def test_limit_of_a_header_grows_with_the_number_of_arrays(path: Path) -> None:
    params = [np.ones(1) for _ in range(5000)]
    saved = Adam(amsgrad=True, use_ema=True)
    saved.step(params, params)
    saved.save(path)
    assert_all_same_bits(Adam.load(path, params).get_weights(), saved.get_weights())
    assert len(path.read_bytes()) - 4 * 8 * len(params) > 1_000_000


@pytest.mark.parametrize("calls_per_step", [1, 2], ids="steps={}".format)
def test_calls_without_parameters_fit_no_others(path: Path, calls_per_step: int) -> None:
    optimizer = Adam(gradient_accumulation_steps=calls_per_step)
    optimizer.apply_gradients([])
    optimizer.save(path)
    assert Adam.load(path, []).iterations == optimizer.iterations
    # Otherwise, a step after half a mean would be half of what it should be.
    with pytest.raises(ValueError, match=r"has the state of 0\. Received: 1"):
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


def test_what_was_set_later_is_kept_and_lr_replaces_the_saved_one(
    path: Path, training: Training
) -> None:
    training.optimizer.lr, training.optimizer.beta_2 = 0.125, 0.5
    training.optimizer.save(path)
    loaded = Adam.load(path, training.params)
    assert (loaded.lr, loaded.beta_2) == (0.125, 0.5)
    for lr in (0.5, halving):
        loaded = Adam.load(path, training.params, lr=lr)
        assert (loaded.lr, loaded.iterations) == (lr, 3)


def as_torch(params: list[Array]) -> Any:
    torch = pytest.importorskip("torch")
    return [torch.tensor(p, requires_grad=True) for p in params]


LOOKED_AT: dict[str, Callable[[list[Array]], Any]] = {
    "read-only in Fortran order": lambda ps: [read_only(np.array(p, order="F")) for p in ps],
    "strided": lambda ps: [np.repeat(p, 2, -1)[..., ::2] if p.ndim else p for p in ps],
    "of a buffer": lambda ps: [np.frombuffer(p.tobytes(), p.dtype).reshape(p.shape) for p in ps],
    "dict": lambda params: {"a": params[0], "b": [params[1], tuple(params[2:])]},
    "iterator": iter,
    "torch": as_torch,
}


@pytest.mark.parametrize("change", LOOKED_AT.values(), ids=LOOKED_AT)
def test_parameters_are_only_looked_at(
    path: Path, training: Training, change: Callable[[list[Array]], Any]
) -> None:
    resumed = training.resumed(path)
    looked_at = change(resumed.params)
    resumed.optimizer = Adam.load(path, looked_at)
    resumed.check()
    resumed.step(3)
    resumed.check()
    if change is LOOKED_AT["of a buffer"]:
        fresh = Adam.load(path, looked_at)
        with pytest.raises(ValueError, match=r"params\[0\] must be writeable"):
            fresh.apply_gradients([(np.ones_like(p), p) for p in looked_at])


@pytest.mark.parametrize("schedule", [halving, functools.partial(pow, 0.5)])
def test_schedule_is_given_again(path: Path, schedule: Callable[[int], float]) -> None:
    resumed = Training(lr=schedule)
    resumed.step(3)
    resumed.optimizer.save(path)
    called = "'helpers:halving'" if schedule is halving else ""
    for lr in (None, 0.1):
        with pytest.raises(ValueError, match=f"lr must be given as a callable .*{called}"):
            Adam.load(path, resumed.params, lr=lr)
    with pytest.raises(TypeError, match="the same argument"):
        Adam.load(path, resumed.params, lr=schedule, learning_rate=schedule)

    def uncalled(iterations: int) -> float:
        raise AssertionError(iterations)

    assert Adam.load(path, resumed.params, lr=uncalled).lr is uncalled
    resumed.optimizer = Adam.load(path, resumed.params, learning_rate=schedule)
    assert resumed.optimizer.lr is schedule
    resumed.step(3)
    resumed.check()


class Named(Adam):
    """A user's subclass."""


def test_subclass(path: Path) -> None:
    Named(lr=0.5).save(path)
    assert type(Named.load(path, [])) is Named
    loaded: Named = load_checkpoint(Named, path, [np.ones(2)])
    assert loaded.lr == 0.5
    with pytest.raises(ValueError, match="of an optimizer 'Named', not of 'Adam'"):
        Adam.load(path, [])


# -- what is not saved ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"groups": [1, 2]}, TypeError, r"must consist of .* Received: groups=\[1, 2\]"),
        (
            {"name": "x" * 1_000_000},
            ValueError,
            r"less than 1000000 bytes to be saved\. Received: ",
        ),
    ],
    ids=["list", "long"],
)
def test_configuration_that_could_not_be_loaded_is_not_saved(
    path: Path, more: dict[str, Any], error: type[Exception], reason: str
) -> None:
    class More(Adam):
        def get_config(self) -> dict[str, Any]:
            return super().get_config() | more

    with pytest.raises(error, match=reason):
        More().save(path)
    assert names_beside(path) == []


@pytest.mark.parametrize("method", ["exclude_from_weight_decay", "override"])
def test_settings_of_parameters_not_looked_up_are_not_saved(path: Path, method: str) -> None:
    adam = Adam()
    getattr(adam, method)([np.ones(3), np.ones(2)])
    with pytest.raises(ValueError, match=rf"{method}.*before save\. .*Received: 2 parameters"):
        adam.save(path)
    assert names_beside(path) == []


# -- the file ---------------------------------------------------------------------------------


def test_the_file_is_as_documented(path: Path, training: Training) -> None:
    optimizer = training.optimizer
    optimizer.save(path)
    metadata, tensors, data = metadata_of(path), load_file(path), path.read_bytes()
    assert set(metadata) == {"format", "version", "optimizer", "config", "progress", "excluded"}
    assert [metadata[k] for k in ("format", "version", "optimizer")] == ["fusedadam", "1", "Adam"]
    assert json.loads(metadata["config"]) == optimizer.get_config()
    assert json.loads(metadata["progress"])["iterations"] == 3
    names = [f"{kind}.{i}" for kind in ("m", "v", "vhat") for i in range(4)]
    assert tensors.keys() == set(names)
    assert_all_same_bits([tensors[name] for name in names], optimizer.weights[1:])
    Adam.load(path, training.params).save(path)
    assert path.read_bytes() == data
    # The safetensors library, which has another order, may write it again.
    save_file(tensors, path, metadata)
    assert_all_same_bits(Adam.load(path, training.params).weights, optimizer.weights)

    optimizer.override(training.params[1:3], lr=0.5, weight_decay=None)
    training.reference.own = {i: {"lr": 0.5, "weight_decay": None} for i in (1, 2)}
    training.call([None if i == 2 else g for i, g in enumerate(training.grads())])
    training.resumed(path).check()
    metadata = metadata_of(path)
    assert metadata["version"] == "2"
    settings = {"lr": 0.5, "weight_decay": None}
    assert json.loads(metadata["own"]) == {"steps": [4, 4, 3, 4], "overrides": [[[1, 2], settings]]}


def test_arrays_in_the_file_are_aligned_to_their_elements(path: Path) -> None:
    for lr in (1.0, 10.0, 100.0, 1000.0):  # headers of other lengths
        optimizer = Adam(lr, amsgrad=True)
        optimizer.build([np.ones(3, "float32"), np.ones(2)])  # 3 * 3 * 4 bytes, no multiple of 8
        optimizer.save(path)
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:start])
        del entries["__metadata__"]
        for entry in entries.values():
            assert (start + entry["data_offsets"][0]) % {"F32": 4, "F64": 8}[entry["dtype"]] == 0


def test_arrays_in_the_file_are_in_c_order(path: Path) -> None:
    param = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    optimizer = Adam()
    optimizer.apply_gradients([(param.copy(), param)])
    optimizer.save(path)
    assert_all_same_bits([load_file(path)[f"{k}.0"] for k in "mv"], optimizer.weights[1:])
    assert_all_same_bits(Adam.load(path, param).weights, optimizer.weights)


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

SHAPE = "params.0. must have the shape of m.0"
UNFIT: dict[str, tuple[Callable[[list[Array]], Any], type[Exception], str]] = {
    "fewer": (lambda p: p[:3], ValueError, "must be as many .* the state of 4. Received: 3"),
    "more": (lambda p: [*p, np.ones(2)], ValueError, "the state of 4. Received: 5"),
    "transposed": (lambda p: [p[0].T, *p[1:]], ValueError, SHAPE),
    "wider": (lambda p: [p[0].astype("f8"), *p[1:]], ValueError, "params.0. must have the dtype"),
    "swapped bytes": (lambda p: [p[0].astype(">f4")], TypeError, "params.0. must be float32"),
    "integers": (lambda p: [p[0].astype("i2")], TypeError, "params.0. must be float32"),
    "lists": (lambda p: [p[0].tolist()], TypeError, r"params\[0\]\[0\]\[0\] must be a numpy.nd"),
    "masked": (lambda p: [np.ma.array(p[0]), *p[1:]], TypeError, "params.0. must have no mask"),
    "dict in another order": (
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


# -- other processes --------------------------------------------------------------------------

# Single-threaded, so that the process may fork.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@forks
def test_several_processes_save_to_one_path(path: Path) -> None:
    code = f"from crash import *; save_at_once(Path({str(path)!r}), writers=4, saves=25)"
    assert output_of(code, environment=ONE_THREAD) == ""
    assert names_beside(path) == [path.name]


@forks
def test_kill_at_any_instant_leaves_a_whole_file(path: Path) -> None:
    kills = int(os.environ.get("FUSEDADAM_KILLS", "60"))
    code = f"""
        import json
        from crash import *
        print(json.dumps(kill_savers(Path({str(path)!r}), kills={kills}, seed=1)))
    """
    # With coverage measurement, a fork that is measured too would take longer than a save.
    done = run_python(code, environment=ONE_THREAD | NO_COVERAGE, time_limit=60 + kills)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    logging.getLogger(__name__).info(
        "%d savers killed, %d of them in the middle of a save, %d states saved; none lost, none torn",
        *(kills, seen["unfinished"], seen["last"]),
    )
    # Some kills must interrupt a save, and some saves must finish in between.
    assert seen["unfinished"] > kills / 10
    assert seen["last"] > kills / 20
    # Each save removes what the last kill left behind.
    assert seen["most_left"] == 1
    Adam().save(path)
    assert names_beside(path) == [path.name]
