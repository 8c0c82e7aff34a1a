# SPDX-License-Identifier: MIT
"""Tests of the formats' cost model, and of their page and figures, from synthetic results."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")

import storage_results
from figures import NotMeasuredError, bytes_per_element, format_times, gibibytes_at_peak
from formats import FORMATS
from plots import PLOTS
from storage_model import Cost, core_bandwidth, costs_of, measured_speed
from storage_page import storage_memory_part, storage_part

# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "bandwidth", "speed"),
    [
        # Both limited by memory; only float32 is; none is.
        (Cost(12, 1e-9), 7e9, 28 / 12),
        (Cost(12, 1e-9), 14e9, 2.0),
        (Cost(12, 1e-9), 28e9, 1.0),
        (Cost(12, 1e-9), 280e9, 0.3),
        (Cost(12, 0.1e-9), 280e9, 3.0),
    ],
)
def test_speed_of_a_format_by_hand(cost: Cost, bandwidth: float, speed: float) -> None:
    assert cost.speed(Cost(28, 0.3e-9), bandwidth) == pytest.approx(speed)


def test_a_format_wins_below_a_bandwidth() -> None:
    base = Cost(28, 0.3e-9)
    for compute in (0.31e-9, 1e-9, 5e-9):
        cost = Cost(12, compute)
        limit = cost.wins_below(base)
        assert cost.speed(base, 0.99 * limit) > 1
        assert cost.speed(base, limit) == pytest.approx(1)
        assert cost.speed(base, 1.01 * limit) < 1
    assert Cost(12, 0.3e-9).wins_below(base) == math.inf
    with pytest.raises(ValueError, match=r"must move fewer bytes .* Received: 28 and 28"):
        base.wins_below(base)


def test_costs_are_found_in_results() -> None:
    results = storage_results.storage()
    costs = costs_of(results)
    for isa in storage_results.COMPUTE:
        assert list(costs[isa]) == list(FORMATS)
        for name, cost in costs[isa].items():
            assert cost.moved == FORMATS[name].moved
            assert cost.compute == pytest.approx(storage_results.compute(name, isa))
    row = results["rows"][0]
    assert core_bandwidth(row, "avx512") == pytest.approx(storage_results.BANDWIDTH, rel=1e-3)
    assert core_bandwidth(row, "neon") is None
    assert measured_speed(row, "bf16, neon", "neon") is None


def test_costs_need_float32_and_both_sizes() -> None:
    results = storage_results.storage()
    for row in results["rows"][2:]:
        del row["seconds"]["float32, avx2"]
    assert list(costs_of(results)) == ["avx512"]
    assert costs_of({"rows": results["rows"][:3]}) == {}


# ---- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "ours", "speed"),
    [
        ("float32, avx512", "bf16, avx512", 2),
        ("float32, avx512", "packed + int8, avx512", 28 / 25 / 1.1),
        ("float32, avx2", "packed + int8, avx2", 28 / 25 / 1.6),
        ("torch fused bf16", "bf16, avx512", 1.4 / (14 / 25)),
    ],
)
def test_speeds_of_formats_are_those_of_the_model(other: str, ours: str, speed: float) -> None:
    figure = format_times(other, ours, 1 << 26)({"storage": storage_results.storage()})
    assert figure.middle == pytest.approx(speed, rel=1e-3)


def test_a_format_that_was_not_run_says_why() -> None:
    results = storage_results.storage()
    row = results["rows"][0]
    del row["seconds"]["bf16, avx2"]
    row["not_run"]["bf16, avx2"] = "not supported here: avx2"
    figure = format_times("float32, avx2", "bf16, avx2", 1 << 26)
    with pytest.raises(NotMeasuredError, match="at 64M: not supported here: avx2"):
        figure({"storage": results})
    with pytest.raises(NotMeasuredError, match="at 128M: not in this run"):
        format_times("float32, avx2", "bf16, avx2", 1 << 27)({"storage": results})


def test_a_peak_that_was_not_measured_says_why() -> None:
    name = "packed + int8: attach"
    sections = {"storage_memory": {"rows": [], "not_run": {name: "memory: needs 9.0 GiB"}}}
    with pytest.raises(NotMeasuredError, match=r"memory: needs 9\.0 GiB"):
        bytes_per_element("storage_memory", name, 1 << 28)(sections)
    with pytest.raises(NotMeasuredError, match="no 1 x 2 in this run"):
        gibibytes_at_peak("storage_memory", "1 x 2")(sections)


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_has_steps_costs_and_the_limits() -> None:
    results = storage_results.storage()
    results["rows"][0]["not_run"] = {"deepspeed bf16": "no compiler."}
    del results["rows"][0]["seconds"]["deepspeed bf16"]
    text = storage_part(results)
    assert "(25.0 GB/s here)" in text
    assert "less than 25.5 GB/s with avx512 or 17.5 GB/s with avx2.*" in text
    lines = text.splitlines()
    assert "| bf16 | avx512 | 8.00 | 18.8 ms | 50.0 | 2.00 (2.00 to 2.00) |" in lines
    assert "| torchao 8 bit | — | 6.00 | 377 ms | — | 0.025 (0.025 to 0.025) |" in lines
    assert "| packed + int8 | avx512 | 12 | 1.10 ns | below 25.5 GB/s |" in lines
    assert "| bf16 | avx2 | 14 | 0.40 ns | always |" in lines
    assert "- not run: deepspeed bf16 (no compiler)" in lines


def test_the_page_has_the_memory() -> None:
    lines = storage_memory_part(storage_results.storage_memory()).splitlines()
    assert "| packed + int8: attach | 256M | 5.00 | 1.37 GB | 30.0 MB | — |" in lines
    assert lines[-1].endswith("| 17.5 GB | 4.0 MB | 1.50 s (1.50 s to 1.50 s) |")


def test_formats_that_were_not_timed_have_a_page() -> None:
    row = storage_results.storage()["rows"][0]
    absent = {**row, "seconds": {}, "not_run": dict.fromkeys(row["seconds"], "no torch")}
    results = {"rows": [{**absent, "held_bytes": {}}], "isa": "avx512"}
    assert "(no torch)" in storage_part(results)
    assert PLOTS["storage"].draw(results).texts[0].get_text() == "not measured"
