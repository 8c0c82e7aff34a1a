# SPDX-License-Identifier: MIT
"""Tests of the turns of contenders, of their check, and of what is told about those that fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import peers
import pytest
import run
from at_once import together
from peers import PEERS, Contender, Work, reference
from peers.formats import FORMATS, contender
from runner import Bench, contest, contestant
from runner.contest import Contest
from runner.machine import SPARE_BYTES
from runner.worker import Worker, WorkerError, absence, call

NAMES = ("fusedadam", "numpy")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Two rounds on one thread."""
    held = Bench(Contest(), threads=1, rounds=2, quick=True)
    yield held
    held.contest.close()


def test_a_row_has_a_time_of_each_contender_in_each_round(bench: Bench) -> None:
    row = bench.contest.row(bench, NAMES, [100, 20, 3])
    assert {name: len(times) for name, times in row["seconds"].items()} == dict.fromkeys(NAMES, 2)
    assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)
    assert (row["tensors"], row["elements"], row["threads"], row["not_run"]) == (3, 41, 1, {})


def test_contenders_take_turns_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    class Spy:
        def call(self, function: object, name: str, steps: int) -> float:
            assert (function, steps) == (contestant.warm_seconds_of, 3)
            turns.append(name)
            if len(turns) == 3:  # of two contenders, so the first one's second turn
                raise WorkerError("has ended")
            return float(len(turns))

    monkeypatch.setattr(contest, "PAUSE", 0.001)
    ready = {n: contest.Turn(Spy(), 3, True, 0.01) for n in "ab"}  # type: ignore[arg-type]
    not_run: dict[str, str] = {}
    assert contest.timed(ready, 3, not_run) == {"b": [2.0, 4.0, 5.0]}
    assert (turns, not_run) == ([*"ababb"], {"a": "has ended"})
    # A slow case has fewer rounds, but some.
    slow = {"b": ready["b"]._replace(seconds=30.0)}
    assert len(contest.timed(slow, 9, {})["b"]) == contest.LEAST_ROUNDS


def computing(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what is found if a contender of another formula claims this one."""
    right = peers.load(name).make

    def make(*arguments: object) -> dict[str, Contender]:
        return {name: c._replace(form=form) for name, c in right(*arguments).items()}

    monkeypatch.setattr(peers.load(name), "make", make)
    return reference.error(name, Work(()), threads=1)


@pytest.mark.parametrize("form", ["algorithm 1", "twin"])
def test_another_formula_is_found_and_not_timed(
    form: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = computing(form, "numpy", monkeypatch)
    assert "parameter 0 is off by" in wrong
    # In a contest, the check is in the contender's process.
    monkeypatch.setattr(Worker, "receive", lambda _worker: {"numpy": wrong})
    row = bench.contest.row(bench, ["numpy"], [100])
    assert (row["seconds"], row["not_run"]) == ({}, {"numpy": f"wrong result: {wrong}"})
    failed = f"sizes: 1 x 100: numpy: wrong result: {wrong}"
    assert [*run.failures({"sizes": {"rows": [row]}})] == [failed]


@pytest.mark.parametrize("stored", FORMATS)
def test_another_formula_is_found_within_the_rounding_of_a_format(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusedadam = pytest.importorskip("fusedadam")
    pytest.importorskip("torch")
    assert "is off by" in computing("hat", contender(stored, fusedadam.active_isa()), monkeypatch)


def test_what_cannot_run_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PEERS["deepspeed"].limit(Work((1,), "float64")) == "has no float64"
    assert PEERS["optax"].limit(Work((1,) * 1_001)).startswith("more than 1,000 tensors: ")
    missing = PEERS["numpy"]._replace(packages=("no_such_module", "json"))
    assert missing.absent() == absence("no_such_module") == "not installed: no_such_module"
    # 16 bytes per element for each contender, and 12 for numpy's temporaries.
    monkeypatch.setattr(contest, "memory_bytes", lambda _field: SPARE_BYTES + 44 * 100 - 1)
    row = bench.contest.row(bench, NAMES, [100])
    assert row["seconds"].keys() == {"fusedadam"}
    assert row["not_run"]["numpy"].startswith("memory: needs")
    assert [*run.failures({"sizes": {"rows": [row]}})] == []


def test_a_run_fails_by_errors_and_without_rows() -> None:
    row = {"case": "1 x 1", "not_run": {"optax": "ImportError: jax", "numba": "too slow"}}
    sections = {"tail": {"rows": [row]}, "sizes": {"rows": []}}
    sections |= {"large": {"rows": [], "error": "OSError: x"}}
    failed = ["tail: 1 x 1: optax: ImportError: jax", "sizes: no rows", "large: OSError: x"]
    assert [*run.failures(sections)] == failed


def test_ours_take_part_whatever_is_chosen(bench: Bench) -> None:
    bench.peers = frozenset(["numba"])
    names = ("fusedadam", "traffic twin", "torch fused", "numba", "bf16, avx2", "fusedadam.torch")
    assert bench.chosen(names) == [name for name in names if name != "torch fused"]


def test_processes_that_threads_start_at_once_have_their_own_variables() -> None:
    # A quick run starts them from two threads.
    def seen(i: int) -> list[str]:
        name = "FUSEDADAM_TEST_OWN"
        return [call(os.getenv, name, threads=1, environment={name: f"{i}"}) for _ in range(25)]

    assert together(2, seen) == [["0"] * 25, ["1"] * 25]


def test_a_process_has_its_variables_and_tells_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDADAM_TEST_REMOVED", "old")
    environment = {"FUSEDADAM_TEST_REMOVED": None, "FUSEDADAM_TEST_NEW": "new"}
    with Worker(1, environment=environment) as worker:
        names = ("FUSEDADAM_TEST_REMOVED", "FUSEDADAM_TEST_NEW", "OMP_NUM_THREADS")
        assert [worker.call(os.getenv, name) for name in names] == [None, "new", "1"]
        assert worker.call(print, "what libraries print is no answer") is None
        with pytest.raises(WorkerError, match=r"^ValueError: invalid literal"):
            worker.call(int, "x")
        assert worker.call(int, "7") == 7
    assert os.environ["FUSEDADAM_TEST_REMOVED"] == "old"
    with pytest.raises(WorkerError, match="ended with code -9"):
        call(signal.raise_signal, signal.SIGKILL, threads=1)
