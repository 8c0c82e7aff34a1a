# SPDX-License-Identifier: MIT
"""Tests of the benchmark's peers, and of the processes and rounds in which they are timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rounds
from lines import WorkerError
from peers import (
    ADAPTERS,
    PEERS,
    TAIL_PEERS,
    Tail,
    Work,
    fusedadam_adam,
    load,
    numpy_adam,
    reference,
    twin,
)
from processes import Worker, probe
from rounds import Case, Contest
from settings import Settings
from worker import work_of

BENCH = Path(rounds.__file__).parent
FRAMEWORKS = {"torch", "deepspeed", "tensorflow", "keras", "jax", "optax", "numba", "fusedadam"}
QUICK = Settings(threads=1, rounds=2, quick=True)


@pytest.fixture(autouse=True)
def no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the twin an absent peer, so that tests compile nothing."""
    monkeypatch.setattr(twin, "library_path", str)


def test_adapters_are_read_without_their_peers() -> None:
    names = {*PEERS.values(), *TAIL_PEERS.values(), *ADAPTERS.values()}
    modules = [f"peers.{module}" for module in names]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print(*{FRAMEWORKS}.intersection(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", PEERS | ADAPTERS)
def test_adapters_know_their_limits(name: str) -> None:
    assert load((PEERS | ADAPTERS)[name]).limit(name, Work((1000,))) == ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["fusedadam", "numpy"])
def test_a_right_contender_is_right(name: str, dtype: str) -> None:
    assert reference.error(load(PEERS[name]), name, Work((), dtype), threads=2) == ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "needs"), [("fusedadam.torch", ["torch"]), ("fusedadam.keras", ["keras", "torch"])]
)
def test_the_library_is_right_behind_a_framework(name: str, needs: list[str], dtype: str) -> None:
    for module in needs:
        pytest.importorskip(module)
    # A process can choose only one backend of Keras, so this needs its own process.
    with Worker(ADAPTERS[name], threads=2) as worker:
        assert worker.receive().keys() == {"fusedadam", *needs}
        assert worker.ask("error", name=name, dtype=dtype, tail=False) == ""


def test_the_tail_is_right() -> None:
    assert reference.error(load("fusedadam_adam"), "fusedadam", Work((), tail=Tail()), 2) == ""


@pytest.mark.parametrize("form", ["algorithm 1", "twin"])
def test_another_formula_is_found(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_adam.NumPyStep, "form", form)
    assert "parameter 0 is off by" in reference.error(load("numpy_adam"), "numpy", Work(()), 1)


def test_values_are_of_the_sizes_and_type_asked_for() -> None:
    work = Work((0, 1, 5000, 3 << 20), "float64")
    for arrays in (list(work.params()), list(work.grads())):
        assert [array.size for array in arrays] == list(work.sizes)
        assert all(array.dtype == np.float64 and array.flags.writeable for array in arrays)
    assert all((grad > 0).all() for grad in work.grads())
    one, other = (next(Work((9,), seed=seed).params()) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_contenders_of_one_process_share_their_arrays() -> None:
    arrays = fusedadam_adam.Arrays(Work((10,)), threads=1)
    step = fusedadam_adam.Step(arrays)
    step.set_grads([np.full(10, 0.5, np.float32)])
    before = arrays.params[0].copy()
    step.step()
    assert np.all(arrays.params[0] < before)


@pytest.fixture
def contest() -> Iterator[Contest]:
    with Contest(["fusedadam", "traffic twin", "numpy"], QUICK) as contest:
        yield contest


def test_a_row_has_a_time_of_each_contender_in_each_round(contest: Contest) -> None:
    row = contest.row(Case("3 x 100", 3, 100))
    assert {name: len(times) for name, times in row["seconds"].items()} == {
        "fusedadam": 2,
        "numpy": 2,
    }
    assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)
    assert row["steps"].keys() == row["seconds"].keys()
    assert row["not_run"].keys() == {"traffic twin"}
    assert (row["tensors"], row["elements"], row["threads"]) == (3, 100, 1)


def test_tensors_may_differ_in_size(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    send = Worker.send

    def record(self: Worker, command: str, **arguments: object) -> None:
        sent.append(arguments.get("work"))
        send(self, command, **arguments)

    monkeypatch.setattr(Worker, "send", record)
    row = contest.row(Case("a model", 3, 41, (100, 20, 3)), ["fusedadam", "numpy"])
    assert row["seconds"].keys() == {"fusedadam", "numpy"}
    assert (row["tensors"], row["elements"]) == (3, 41)
    work = next(work for work in sent if isinstance(work, list))
    assert work_of(*work).sizes == (100, 20, 3)
    assert work_of(2, 5, "float32", False).sizes == (5, 5)


def test_a_contender_that_does_not_fit_into_memory_is_named(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "available_bytes", lambda: rounds.SPARE_BYTES)
    row = contest.row(Case("1 x 100", 1, 100))
    assert row["seconds"] == {}
    assert all(why.startswith("memory: needs") for why in row["not_run"].values())


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Worker.ask

    def claim_error(self: Worker, command: str, **arguments: object) -> object:
        return "off" if command == "error" else ask(self, command, **arguments)

    monkeypatch.setattr(Worker, "ask", claim_error)
    with Contest(["numpy"], QUICK) as contest:
        row = contest.row(Case("1 x 100", 1, 100))
    assert (row["seconds"], row["not_run"]) == ({}, {"numpy": "wrong result: off"})


def test_fusedadam_takes_part_whatever_is_chosen() -> None:
    rounds.choose(["numba"])
    try:
        assert rounds.chosen(PEERS) == ["fusedadam", "traffic twin", "numba"]
    finally:
        rounds.choose(None)


def test_a_missing_peer_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "numpy", "no_such_peer")
    versions, absent = probe(["numpy"], threads=1)
    assert versions == {}
    assert absent == {"numpy": "ModuleNotFoundError: No module named 'peers.no_such_peer'"}


def test_what_a_worker_raises_names_itself_and_leaves_it_running() -> None:
    with Worker("numpy_adam", 1) as worker:
        assert worker.receive() == {"numpy": np.__version__}
        with pytest.raises(WorkerError, match="KeyError: 'numba'"):
            worker.ask("calibrate", name="numba")
        assert worker.ask("error", name="numpy", dtype="float32", tail=False) == ""


def test_the_end_of_a_worker_is_told() -> None:
    with Worker("numpy_adam", 1) as worker:
        worker.receive()
        worker._process.kill()
        with pytest.raises(WorkerError, match="ended with code -9"):
            worker.ask("free")
