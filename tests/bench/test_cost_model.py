# SPDX-License-Identifier: MIT
"""Tests of the cost model: its formula, the fit of its constants, and its predictions."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from cost_model import SMALLEST_PARALLEL_STEP, CostModel, Fit, Sample, fit, samples_of
from cost_page import cost_model_part
from sharding import (
    Network,
    Server,
    machines_for_memory,
    most_saved_of_an_exchange,
    network_that_pays,
    saved_by_sharding,
    seconds_from_one_socket,
    seconds_per_parameter,
    traffic_seconds,
)

MODEL = CostModel(
    call=3e-6,
    fork=2.5e-6,
    tensor_cached=1.5e-7,
    tensor_memory=4e-7,
    rate=2.9e9,
    core_bandwidth=35e9,
    memory_bandwidth=53e9,
    cache=26e6,
)
SIZES = [10**k * digit for k in range(2, 8) for digit in (1, 3)]


def sample(tensors: int, elements: int, threads: int, seconds: float | None = None) -> Sample:
    """A sample with the model's own prediction, unless `seconds` is given."""
    n = tensors * elements
    exact = MODEL.seconds(n, tensors=tensors, threads=threads)
    return Sample("sizes", f"{tensors} x {elements}", tensors, n, threads, seconds or exact)


SAMPLES = [
    *(sample(1, n, threads) for n in SIZES for threads in (1, 2)),
    *(sample(10**k, 1_000, 2) for k in range(1, 6)),
    sample(100_000, 100, 2),
]


def test_formula_by_hand() -> None:
    # A small step runs on one thread and is fully cached.
    assert MODEL.seconds(10_000, threads=2) == pytest.approx(3e-6 + 1.5e-7 + 10_000 / 2.9e9)
    # In a large step, everything beyond 26 MB runs at memory speed.
    n, cached = 10_000_000, 26e6 / 16
    expected = 3e-6 + 2.5e-6 + cached / (2 * 2.9e9) + (n - cached) * 28 / 53e9
    expected += 1.5e-7 * cached / n + 4e-7 * (1 - cached / n)
    assert MODEL.seconds(n, threads=2) == pytest.approx(expected)
    # On one thread, the bandwidth of its core is the limit.
    assert MODEL.work(10**9, 1) == pytest.approx(10**9 * 28 / 35e9, rel=0.01)


def test_fit_recovers_the_constants() -> None:
    result = fit(SAMPLES, cores=2)
    assert astuple(result.model) == pytest.approx(astuple(MODEL), rel=1e-3)
    assert max(abs(r) for r in result.residuals()) < 1e-4


def test_fit_recovers_the_constants_from_noise() -> None:
    noisy = [
        s._replace(seconds=s.seconds * (1.03 if i % 2 else 0.97)) for i, s in enumerate(SAMPLES)
    ]
    result = fit(noisy, cores=2)
    found, known = (vars(model) for model in (result.model, MODEL))
    for name, error in result.uncertainty.items():
        assert abs(math.log(found[name] / known[name])) < 4 * error


def test_what_no_measurement_depends_on_is_not_determined() -> None:
    result = fit([sample(1, n, 1) for n in SIZES], cores=2)
    assert result.uncertainty["fork"] == math.inf
    assert math.isfinite(result.uncertainty["rate"])
    assert "not determined by these rows" in cost_model_part(result, 2, None)


def test_more_threads_than_cores_are_left_out() -> None:
    slow = sample(1, 1_000_000, 4, seconds=1.0)
    assert slow not in fit([*SAMPLES, slow], cores=2).samples


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples must be at least 8, .* Received: 3"):
        fit(SAMPLES[:3], cores=2)


def test_samples_are_medians_of_our_float32_steps() -> None:
    row = {
        "case": "10 x 100",
        "dtype": "float32",
        "threads": 2,
        "tensors": 10,
        "elements": 100,
        "seconds": {"fusedadam": [3.0, 1.0, 2.0], "numpy": [9.0, 9.0, 9.0]},
    }
    wide = {**row, "dtype": "float64"}
    absent = {**row, "seconds": {"numpy": [9.0]}}
    sections = {"sizes": {"rows": [row, wide, absent]}}
    sections |= {"many_tensors": {"rows": []}, "threads": {"rows": []}}
    assert samples_of(sections) == [Sample("sizes", "10 x 100", 10, 1_000, 2, 2.0)]


def test_server_by_hand() -> None:
    server = Server()
    # 80 % of 24 channels of 38.4 GB/s.
    assert server.bandwidth == pytest.approx(737.28e9)
    assert seconds_per_parameter(MODEL, server) == pytest.approx(28 / 737.28e9)
    assert seconds_from_one_socket(MODEL, server) == pytest.approx(56 / 737.28e9)
    # With slow cores, computation is the limit.
    slow = replace(MODEL, rate=1e8)
    assert seconds_per_parameter(slow, server) == pytest.approx(1 / (96 * 1e8))
    weak = replace(MODEL, core_bandwidth=1e9)
    assert seconds_per_parameter(weak, server) == pytest.approx(28 / 96e9)


def test_sharding_pays_beyond_a_speed_of_the_network_for_any_number_of_machines() -> None:
    step = 28 / 700e9
    assert network_that_pays(step) == pytest.approx(200e9)
    # Networks that achieve slightly more and slightly less than that.
    faster, slower = (Network(8 * 200 * f / 0.9) for f in (1.01, 0.99))
    for machines in (2, 3, 64):
        assert saved_by_sharding(step, machines) > traffic_seconds(faster, machines)
        assert saved_by_sharding(step, machines) < traffic_seconds(slower, machines)
    assert traffic_seconds(Network(100), 2) == pytest.approx(4 / 11.25e9)
    # The exchange moves 8 B at 11.25 GB/s, in addition to the step.
    share = step / (step + 8 / 11.25e9)
    assert most_saved_of_an_exchange(step, Network(100)) == pytest.approx(share)


def test_machines_for_memory() -> None:
    server = Server(module_bytes=10**9, usable=1.0)  # 24 GB
    assert machines_for_memory(1e9, server, all_sharded=False) == 1
    # 20 GB of parameters and gradients leave 4 GB for 20 GB of moments.
    assert machines_for_memory(2.5e9, server, all_sharded=False) == 5
    assert machines_for_memory(2.5e9, server, all_sharded=True) == 2
    with pytest.raises(ValueError, match="must fit with their gradients on one server"):
        machines_for_memory(3e9, server, all_sharded=False)


def test_page_has_predictions_and_residuals() -> None:
    large = {"rows": [{"elements": 10**9, "seconds": {"fusedadam": [0.6]}}]}
    text = cost_model_part(fit(SAMPLES, cores=2), 2, large)
    # 28 B at 737 GB/s; 100 times as many parameters take 100 times 16 GB.
    assert "| 1B | 16.0 GB | 38.0 ms | 76.0 ms | 1 |" in text
    assert "| 100B | 1.60 TB | 3.80 s | 7.60 s | 2 |" in text
    assert "1B parameters: predicted" in text
    assert text.count("| sizes |") == len(SAMPLES)
    assert isinstance(fit(SAMPLES, cores=2), Fit)


def test_smallest_parallel_step_is_that_of_the_core() -> None:
    source = Path(__file__).parents[2] / "src/cpp/parallel/shared_pass.hpp"
    found = re.search(r"smallest_shared = (\d+);", source.read_text(encoding="utf-8"))
    assert found is not None
    assert int(found[1]) == SMALLEST_PARALLEL_STEP
