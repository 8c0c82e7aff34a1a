# SPDX-License-Identifier: MIT
"""Tests that run sections of the benchmark on small work, and check the form of their results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child
import fusedadam
import numpy as np
import peaks as peaks_of
import pytest
import rounds
import sections
from formats import FORMATS, PACKED, contender, parts_of
from helpers import running
from peers import Work, twin
from sections import adapters, at_once, callbacks, calls, imports, ranks, runtimes, training
from settings import Results, Settings

ROUNDS = 2
SETTINGS = Settings(threads=2, rounds=ROUNDS, quick=True)

ABSENT = "ModuleNotFoundError: No module named 'torch'"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads, which sections change."""
    with running(threads=fusedadam.get_num_threads()):
        yield


def results_of(name: str, capfd: pytest.CaptureFixture[str]) -> Results:
    """Run a section, and return its results as read from the file.

    The section must tick as often as it declares, and print nothing.
    """
    section = sections.load(name)
    ticked: list[str] = []
    results = section.run(SETTINGS, ticked.append)
    assert len(ticked) == section.ticks(SETTINGS)
    assert all(ticked)
    assert section.TITLE
    assert capfd.readouterr() == ("", "")
    copy: Results = json.loads(json.dumps(results))
    return copy


def check_seconds(seconds: list[float], count: int = ROUNDS) -> None:
    """Check that there is one time per round."""
    assert len(seconds) == count
    assert all(0 < value < math.inf for value in seconds)


def check_timed(row: dict[str, Any]) -> None:
    """Check a timed row."""
    assert row["case"]
    assert row["dtype"] == "float32"
    assert row["threads"] == SETTINGS.threads
    assert row["seconds"]
    for values in row["seconds"].values():
        check_seconds(values)


def test_calls(capfd: pytest.CaptureFixture[str]) -> None:
    results = results_of("calls", capfd)
    for row in results["rows"]:
        check_timed(row)
        contenders = {"fusedadam", "fresh gradients", "get_updates"}
        assert set(row["seconds"]) == contenders | ({"adam_step"} if row["tensors"] == 1 else set())
        assert set(row["steps"]) == set(row["seconds"])
        assert row["case"] == f"{row['tensors']:,} x {row['elements']:,}"
    for parts in (results["profile"], results["profile_within"]):
        assert all(part["part"] and math.isfinite(part["microseconds"]) for part in parts)


def test_parts_of_a_call_add_up_to_it() -> None:
    for part, following in zip(calls.PARTS, calls.PARTS[1:], strict=False):
        assert part.without == following.call
    assert calls.PARTS[-1].without == "pass"


@pytest.mark.parametrize("torch_is_here", [True, False])
def test_training(
    torch_is_here: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch_is_here:
        without_torch(monkeypatch)
    results = results_of("training", capfd)
    missing = {
        framework
        for framework, modules in training.NEEDS.items()
        if child.absence(*modules) is not None
    }
    assert set(results["not_run"]) == {f"training in {framework}" for framework in missing}
    assert all(reason.startswith("ModuleNotFoundError") for reason in results["not_run"].values())
    optimizers = {"numpy": training.NUMPY_TRAININGS, "torch": training.TORCH_TRAININGS}
    assert [(row["framework"], row["optimizer"]) for row in results["rows"]] == [
        (framework, optimizer)
        for framework, names in optimizers.items()
        for optimizer in names
        if framework not in missing
    ]
    for row in results["rows"]:
        check_seconds(row["gradient_seconds"], training.epochs(SETTINGS))
        check_seconds(row["optimizer_seconds"], training.epochs(SETTINGS))
        assert row["accuracy"] >= training.REQUIRED_ACCURACY


def test_sparse_rows(capfd: pytest.CaptureFixture[str]) -> None:
    for row in results_of("sparse_rows", capfd)["rows"]:
        check_timed(row)
        assert set(row["seconds"]) == {"lazy", "dense"}
        assert 0 < row["rows"] < row["table_rows"]


def test_imports(capfd: pytest.CaptureFixture[str]) -> None:
    results = results_of("imports", capfd)
    assert [row["package"] for row in results["rows"]] == ["numpy", "fusedadam"]
    for row in results["rows"]:
        check_seconds(row["seconds"])
    own = [part["own_seconds"] for part in results["parts"]]
    assert own == sorted(own, reverse=True)
    assert "fusedadam._core" in {line.module for line in imports.trace()}


@pytest.mark.parametrize("torch_is_here", [True, False])
def test_neighbours(
    torch_is_here: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch_is_here:
        without_torch(monkeypatch)
    results = results_of("neighbours", capfd)
    for row in results["rows"]:
        check_timed(row)
    cases = {row["case"] for row in results["rows"]}
    by_torch = 2  # orders of imports
    if child.absence("torch") is None:
        assert not results["not_run"]
        assert sum("torch" in case for case in cases) == by_torch
    else:
        assert list(results["not_run"].values()) == [ABSENT] * by_torch
        assert not cases & set(results["not_run"])
    assert any("products of numpy" in case for case in cases)


def test_adapters(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "library_path", str)  # the twin is not needed, so it is not built
    # A contest does not check what is installed: its processes report what they cannot import.
    here = {name: child.absence(name) is None for name in ("keras", "torch")}
    results = results_of("adapters", capfd)
    timed = [row for row in results["rows"] if "seconds" in row]
    assert [row["case"] for row in timed] == [case.name for _, case in adapters.cases(SETTINGS)]
    for row in timed:
        contenders = {row["adapter"], *adapters.BESIDE[row["adapter"]]}
        assert row["seconds"].keys() | row["not_run"].keys() == contenders
        assert not row["seconds"].keys() & row["not_run"].keys()
        assert all("ModuleNotFoundError" in why for why in row["not_run"].values())
        if here["torch"] and (here["keras"] or row["adapter"] == adapters.TORCH):
            check_timed(row)
    peaks = [row for row in results["rows"] if "seconds" not in row]
    assert len(peaks) + len(results["not_run"]) == len(adapters.trainings(SETTINGS))
    if here["torch"] and peaks_of.RESET_PEAK.exists():
        assert [row["attached"] for row in peaks] == [False, True]
    for row in peaks:
        assert 0 < row["baseline_bytes"] < row["peak_bytes"]


def test_storage(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "library_path", str)
    # The peers need minutes to compile; test_peers.py checks them.
    rounds.choose([])
    try:
        results = results_of("storage", capfd)
    finally:
        rounds.choose(None)
    assert [row["threads"] for row in results["rows"]] == [2, 2, 1, 1]
    names = [contender(name, results["isa"]) for name in FORMATS]
    for row in results["rows"]:
        if child.absence("torch") is not None:
            assert all("ModuleNotFoundError" in why for why in row["not_run"].values())
            continue
        assert not row["not_run"]
        assert row["seconds"].keys() >= {*names}
        for values in row["seconds"].values():
            check_seconds(values)
        for name, held in row.get("held_bytes", {}).items():
            stored, _ = parts_of(name) or ("", "")
            # A count of the steps as well.
            assert held == FORMATS[stored].held * row["elements"] + 4


def test_storage_memory(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_of("storage_memory", capfd)
    packed = FORMATS[PACKED]
    if child.absence("torch") is None and peaks_of.RESET_PEAK.exists():
        assert [round(row["held_bytes"] / row["elements"], 1) for row in results["rows"]] == [
            packed.held,
            packed.held - packed.gradient,
            packed.held,
        ]
        assert not results["not_run"]
        for row in results["rows"]:
            assert 0 < row["baseline_bytes"] < row["peak_bytes"]
    monkeypatch.setattr(peaks_of, "available_bytes", lambda: 0)
    results = results_of("storage_memory", capfd)
    assert results["rows"] == []
    assert [why.partition(":")[0] for why in results["not_run"].values()] == ["memory"] * 3


def test_callbacks(capfd: pytest.CaptureFixture[str]) -> None:
    results = results_of("callbacks", capfd)
    missing = [name for name, needs in callbacks.NEEDS.items() if child.absence(*needs) is not None]
    assert list(results["not_run"]) == [f"Keras on {name}" for name in missing]
    assert len(results["rows"]) + len(missing) == len(callbacks.NEEDS)
    for row in results["rows"]:
        check_timed(row)
        assert {name.split(",")[0] for name in row["seconds"]} == {"keras", "callback"}


def test_a_callback_that_computes_something_else_is_not_shown() -> None:
    work = Work((3,))
    right = np.ones(3, "float32")
    wrong = right + np.float32(1e-5)
    entries = {
        "keras": callbacks.Entry(lambda: None, lambda: [right]),
        "callback": callbacks.Entry(lambda: None, lambda: [wrong]),
    }
    callbacks.require_same(entries, work, steps=100)  # 100 roundings of 1.0
    with pytest.raises(ArithmeticError, match="wrong result: callback differs from keras"):
        callbacks.require_same(entries, work, steps=10)


def test_ranks(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "library_path", str)
    results = results_of("ranks", capfd)
    (row,) = results["rows"]
    check_timed(row)
    assert len(row["seconds"]) == 3
    monkeypatch.setattr(ranks, "available_bytes", lambda: 0)
    results = results_of("ranks", capfd)
    assert results["rows"] == []
    assert list(results["not_run"]) == [row["case"]]


def test_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    results = results_of("at_once", capfd)
    for row in results["rows"]:
        check_timed(row)
        assert list(row["seconds"]) == [at_once.IN_TURN, at_once.AT_ONCE, at_once.LATER]
        assert row["case"] == f"{row['tensors']} optimizers x {row['elements']:,}"


@pytest.mark.parametrize("torch_is_here", [True, False])
def test_runtimes(
    torch_is_here: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch_is_here:
        without_torch(monkeypatch)
    results = results_of("runtimes", capfd)
    names = runtimes.names(SETTINGS)
    missing = [
        name for name in names if child.absence(*runtimes.PROCESSES[name].modules) is not None
    ]
    assert list(results["not_run"]) == missing
    assert [row["when"] for row in results["rows"]] == list(runtimes.WHENS)
    for row in results["rows"]:
        check_timed(row)
        assert set(row["seconds"]) == set(names) - set(missing)


def test_no_peak_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_torch(monkeypatch)
    monkeypatch.setattr(peaks_of, "RESET_PEAK", tmp_path)
    trainings = adapters.trainings(SETTINGS)
    rows, not_run = peaks_of.peak_rows(trainings, SETTINGS, lambda _words: None)
    assert (rows, not_run) == ([], dict.fromkeys(trainings, ABSENT))


def test_trainings_that_differ_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.1])
    monkeypatch.setattr(peaks_of, "absent", lambda _training: "")
    monkeypatch.setattr(child, "call", lambda *_: (1, 2, 3, next(losses)))
    trainings = adapters.trainings(SETTINGS)
    rows, not_run = peaks_of.peak_rows(trainings, SETTINGS, lambda _words: None)
    assert rows == []
    assert set(not_run) == set(trainings)
    assert all(why.startswith("wrong result") for why in not_run.values())


def test_the_model_has_the_size_of_its_target() -> None:
    assert len(adapters.MODEL) == 40
    assert sum(adapters.MODEL) == pytest.approx(10_000_000, rel=0.01)


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch seem absent to sections."""
    absence = child.absence

    def without(*modules: str) -> str | None:
        return ABSENT if "torch" in modules else absence(*modules)

    monkeypatch.setattr(child, "absence", without)


# ---- processes of their own --------------------------------------------------------------------


def test_a_child_has_the_variables_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDADAM_TEST_KEPT", "kept")
    monkeypatch.setenv("FUSEDADAM_TEST_REMOVED", "old")
    environment = {"FUSEDADAM_TEST_REMOVED": None, "FUSEDADAM_TEST_NEW": "new"}
    values = {
        name: child.call(os.getenv, f"FUSEDADAM_TEST_{name}", environment=environment)
        for name in ("KEPT", "REMOVED", "NEW")
    }
    assert values == {"KEPT": "kept", "REMOVED": None, "NEW": "new"}


def test_what_a_child_prints_is_no_part_of_its_answer() -> None:
    assert child.call(print, "from a library") is None


def test_an_error_in_a_child_is_one_here() -> None:
    with pytest.raises(RuntimeError, match=r"must end well.*exit status 1\n(?s:.*)JSONDecodeError"):
        child.call(json.loads, "{")
    with pytest.raises(RuntimeError, match="exit status 3"):
        child.run_python(["-c", "import sys; sys.exit(3)"])


def test_absence_names_the_module() -> None:
    assert child.absence("json", "os") is None
    assert child.absence("json", "no_such_module") == (
        "ModuleNotFoundError: No module named 'no_such_module'"
    )
