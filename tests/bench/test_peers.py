# SPDX-License-Identifier: MIT
"""Tests of the benchmark's peers, and of the processes and rounds in which they are timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import child
import fusedadam
import numpy as np
import pytest
import rounds
from formats import FLOAT32, FORMATS, ISAS, contender
from helpers import running
from lines import WorkerError
from peers import (
    ADAPTERS,
    FORMAT_PEERS,
    MODULES,
    PEERS,
    STORING_PEERS,
    TAIL_PEERS,
    Tail,
    Work,
    bitsandbytes_fork,
    fusedadam_adam,
    fusedadam_storage,
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
FRAMEWORKS |= {"bitsandbytes", "torchao"}
QUICK = Settings(threads=1, rounds=2, quick=True)


@pytest.fixture(autouse=True)
def no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the twin an absent peer, so that tests compile nothing."""
    monkeypatch.setattr(twin, "library_path", str)


def require(*modules: str) -> None:
    """Skip the test if one of these modules is not installed."""
    for module in modules:
        pytest.importorskip(module)


def test_adapters_are_read_without_their_peers() -> None:
    names = {*MODULES.values(), *TAIL_PEERS.values()}
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


@pytest.mark.parametrize("name", PEERS | ADAPTERS | STORING_PEERS)
def test_adapters_know_their_limits(name: str) -> None:
    assert load(MODULES[name]).limit(name, Work((1000,))) == ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["fusedadam", "numpy"])
def test_a_right_contender_is_right(name: str, dtype: str) -> None:
    assert reference.error(load(PEERS[name]), name, Work((), dtype), threads=2) == ""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "needs"), [("fusedadam.torch", ["torch"]), ("fusedadam.keras", ["keras", "torch"])]
)
def test_the_library_is_right_behind_a_framework(name: str, needs: list[str], dtype: str) -> None:
    require(*needs)
    # A process can choose only one backend of Keras, so this needs its own process.
    with Worker(ADAPTERS[name], threads=2) as worker:
        assert worker.receive().keys() == {"fusedadam", *needs}
        assert worker.ask("error", name=name, dtype=dtype, tail=False) == ""


@pytest.mark.parametrize("isa", fusedadam.supported_isas())
@pytest.mark.parametrize("stored", FORMATS)
def test_a_format_is_right_and_as_small_as_it_says(stored: str, isa: str) -> None:
    require("torch")
    name = contender(stored, isa)
    peer = load(FORMAT_PEERS[name])
    with running(isa=isa, threads=2):
        assert reference.error(peer, name, Work(()), threads=2) == ""
        step = peer.make([name], Work((1_000,)), threads=2)[name]
        step.step()
        assert step.held_bytes() == FORMATS[stored].held * 1_000 + 4  # and a count of the steps


@pytest.mark.parametrize("stored", FORMATS)
def test_another_formula_is_found_within_the_tolerance_of_a_format(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("torch")
    monkeypatch.setattr(fusedadam_storage.FormatStep, "form", "hat")
    name = contender(stored, fusedadam.active_isa())
    assert "is off by" in reference.error(load("fusedadam_storage"), name, Work(()), threads=1)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch fused bf16", "torch"),
        ("deepspeed bf16", "deepspeed"),
        ("bitsandbytes 8 bit", "bitsandbytes"),
        ("torchao 8 bit", "torchao"),
        ("bitsandbytes-cpu-fork 8 bit", "bitsandbytes-cpu-fork"),
    ],
)
def test_a_peer_that_stores_less_is_right(name: str, package: str) -> None:
    require("torch")
    # Not imported here, as it may change the process.
    apart = package == bitsandbytes_fork.PACKAGE
    if not (bitsandbytes_fork.DIRECTORY.exists() if apart else child.absence(package) is None):
        pytest.skip(f"{package} is not installed")
    with Worker(STORING_PEERS[name], threads=2) as worker:
        assert package in worker.receive()
        assert worker.ask("error", name=name, dtype="float32", tail=False) == ""


def test_a_format_needs_its_instruction_set_and_float32_work() -> None:
    missing = next((isa for isa in ISAS if isa not in fusedadam.supported_isas()), None)
    assert missing is not None
    peer = load("fusedadam_storage")
    assert peer.limit(contender(FLOAT32, missing), Work(())) == f"not supported here: {missing}"
    here = contender(FLOAT32, fusedadam.active_isa())
    assert peer.limit(here, Work((), "float64")) == "the formats are of float32 work"


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


def test_the_memory_of_formats_is_that_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [contender(stored, fusedadam.active_isa()) for stored in FORMATS]
    needed = sum(stored.held for stored in FORMATS.values()) * 100
    monkeypatch.setattr(rounds, "available_bytes", lambda: rounds.SPARE_BYTES + needed - 1)
    with Contest(names, QUICK) as contest:
        assert contest._not_fit(Case("1 x 100", 1, 100), names).keys() == {*names}
        monkeypatch.setattr(rounds, "available_bytes", lambda: rounds.SPARE_BYTES + needed)
        assert contest._not_fit(Case("1 x 100", 1, 100), names) == {}


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
    monkeypatch.setitem(MODULES, "numpy", "no_such_peer")
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
