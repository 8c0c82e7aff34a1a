# SPDX-License-Identifier: MIT
"""Tests of the report: tables, targets and marked parts of a page, from synthetic results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import report
import storage_results
from cost_model import CostModel
from figures import (
    NotMeasuredError,
    Target,
    adapter_times,
    gradients_saved,
    slowdown_beside_runtimes,
    times,
    worst_at_once,
)
from plots import PLOTS
from report import ReportError, make_report, markers, with_part
from rows import as_bytes, as_count, as_error, as_ratio, as_time, digits, ratio, round_by_round
from tables import adapters_part, figures_part, machine_part, targets_part, timed_part
from targets import TARGETS

MODEL = CostModel(
    call=2.5e-6,
    fork=3e-6,
    tensor_cached=1.8e-7,
    tensor_memory=3.8e-7,
    rate=3e9,
    core_bandwidth=42e9,
    memory_bandwidth=55e9,
    cache=28e6,
)
# Peer -> seconds per call, seconds per tensor, and its time per element relative to ours.
PEERS = {
    "torch default": (9e-5, 2.5e-5, 3.5),
    "torch foreach": (1.5e-4, 1.8e-5, 3.1),
    "torch fused": (3.3e-5, 6e-6, 1.08),
    "tensorflow ResourceApplyAdam": (1.1e-4, 4e-5, 1.6),
    "keras torch": (4e-4, 6e-5, 17.0),
    "optax": (4e-5, 2e-5, 1.9),
    "numba": (2e-6, 8e-7, 1.12),
    "numpy": (2e-5, 1.8e-5, 12.0),
}
ABSENT = {"deepspeed": "ModuleNotFoundError: No module named 'deepspeed'\n(not installed)"}


def timed_row(
    rng: np.random.Generator, tensors: int, elements: int, *, threads: int = 2, wide: bool = False
) -> dict[str, Any]:
    """A row as `run.py` writes it. In each round, `weather` slows all contenders equally."""
    rounds = 9
    weather = 1 + 0.3 * rng.random(rounds)
    n = tensors * elements
    width = 2 if wide else 1
    ours = MODEL.seconds(width * n, tensors=tensors, threads=threads)
    bound = MODEL.work(width * n, threads)
    seconds = {"fusedadam": ours, "traffic twin": 0.98 * width * n / 3e9 / threads}
    seconds["traffic twin"] = max(
        seconds["traffic twin"] * 0.7, 0.98 * MODEL.work(width * n, threads) if n > 4e6 else 0
    )
    for peer, (call, tensor, slower) in PEERS.items():
        seconds[peer] = call + tensors * tensor + slower * bound
    not_run = dict(ABSENT)
    if tensors >= 10_000:
        for peer in ("keras torch", "optax"):
            del seconds[peer]
            not_run[peer] = "would take minutes to compile."
    return {
        "case": f"{tensors:,} x {elements:,}",
        "dtype": "float64" if wide else "float32",
        "threads": threads,
        "tensors": tensors,
        "elements": elements,
        "seconds": {
            name: list(t * weather * (1 + 0.02 * rng.random(rounds))) for name, t in seconds.items()
        },
        "steps": dict.fromkeys(seconds, 3),
        "not_run": not_run,
    }


def sample() -> dict[str, Any]:
    """Return the results of a run with every section."""
    rng = np.random.default_rng(4)

    def noise(seconds: float) -> list[float]:
        return [seconds * (1 + 0.1 * float(x)) for x in rng.random(9)]

    sizes = [100, 1_000, 10_000, 100_000, 1 << 20, 10_000_000, 1 << 26, 100_000_000, 1 << 28]
    tail = {"fusedadam": 0.0566, "traffic twin": 0.0535, "torch": 0.0871}
    gradients = {"numpy": 4.1, "torch": 1.9}
    optimizers = [("numpy", "numpy formula", 1.4), ("numpy", "fusedadam", 0.11)]
    optimizers += [("torch", "torch default", 0.9), ("torch", "fusedadam", 0.12)]
    sections: dict[str, Any] = {
        "sizes": {"rows": [timed_row(rng, 1, n) for n in sizes]},
        "float64": {"rows": [timed_row(rng, 1, 1 << 25, wide=True)]},
        "many_tensors": {
            "rows": [timed_row(rng, 10**k, 1_000) for k in range(6)]
            + [timed_row(rng, 100_000, 100)]
        },
        "threads": {
            "rows": [
                timed_row(rng, k, n, threads=t)
                for k, n in ((1, 1 << 20), (1, 1 << 26), (1_000, 1_000))
                for t in (1, 2)
            ]
        },
        "tail": {
            "rows": [
                {
                    "case": f"tail, 1 x {name}",
                    "dtype": "float32",
                    "threads": 2,
                    "tensors": 1,
                    "elements": n,
                    "seconds": {k: noise(t * n / (1 << 26)) for k, t in tail.items()},
                }
                for name, n in (("1M", 1 << 20), ("64M", 1 << 26))
            ]
        },
        "first_step": {
            "rows": [
                {
                    "case": "64M",
                    "elements": 1 << 26,
                    "memory": memory,
                    "contender": contender,
                    "build": noise(build),
                    "first": noise(first),
                    "later": noise(0.031),
                }
                for memory, contender, build, first in (
                    ("fresh", "fusedadam", 0.07, 0.034),
                    ("fresh", "torch fused", 0.0001, 0.21),
                    ("recycled", "fusedadam", 0.02, 0.033),
                    ("recycled", "torch fused", 0.0001, 0.12),
                )
            ]
        },
        "memory": {
            "rows": [
                {
                    "contender": contender,
                    "elements": 1 << 28,
                    "peak_bytes": (16 << 28) + 50_000_000 + rest,
                    "baseline_bytes": 50_000_000,
                    "expected_bytes": 16 << 28,
                }
                for contender, rest in (
                    ("fusedadam", 3_000_000),
                    ("torch fused", 140_000_000),
                    ("numpy", 3_200_000_000),
                )
            ],
            "not_run": [
                {"contender": "optax", "elements": 1 << 28, "reason": "memory: needs 9 GiB"}
            ],
        },
        "large": {
            "rows": [
                {
                    "elements": n,
                    "part": 1 << 26,
                    "seconds": {
                        "fusedadam": noise(MODEL.seconds(n, threads=2)),
                        "part": noise(MODEL.seconds(1 << 26, threads=2)),
                    },
                }
                for n in (1 << 28, 1_000_000_000)
            ],
            "not_run": {},
        },
        "calls": {
            "rows": [
                timed_row(rng, k, n) for k in (1, 10, 1_000, 100_000) for n in (1, 100, 1_000)
            ],
            "profile": [
                {"part": "Python: arguments", "microseconds": 0.6},
                {"part": "compare pointers and shapes", "microseconds": 0.9},
                {"part": "step of 1,000 elements", "microseconds": 0.5},
            ],
            "profile_within": [{"part": "a method", "microseconds": 0.03}],
        },
        "training": {
            "rows": [
                {
                    "framework": framework,
                    "optimizer": optimizer,
                    "gradient_seconds": noise(gradients[framework]),
                    "optimizer_seconds": noise(steps),
                    "accuracy": 0.975,
                }
                for framework, optimizer, steps in optimizers
            ]
        },
        "sparse_rows": {
            "rows": [
                {
                    "table_rows": 1_000_000,
                    "rows": 1_000,
                    "width": 64,
                    "seconds": {"lazy": noise(4.2e-4), "dense": noise(0.034)},
                }
            ]
        },
        "imports": {
            "rows": [
                {"package": "numpy", "seconds": noise(0.09)},
                {"package": "fusedadam", "seconds": noise(0.04)},
            ],
            "parts": [{"module": "autograd", "own_seconds": 0.004, "seconds_with_imports": 0.02}],
        },
        "neighbours": {
            "rows": [
                {"case": "alone", "seconds": {"fusedadam": noise(0.03)}},
                {"case": "beside torch", "seconds": {"step": noise(0.03), "product": noise(0.1)}},
            ],
            "not_run": {"beside numpy": "why not"},
        },
    }
    for name, contenders in (
        ("callbacks", ("keras", "callback")),
        ("ranks", ("one process", "2 processes")),
    ):
        seconds = {contender: noise(0.03) for contender in contenders}
        sections[name] = {"rows": [{"case": name, "seconds": seconds}], "not_run": {}}
    sections["at_once"] = {
        "rows": [
            {
                "case": f"8 optimizers x {elements:,}",
                "tensors": 8,
                "elements": elements,
                "seconds": {
                    "one after the other": noise(slower * 1e-4),
                    "at once": noise(1e-4),
                    "one after the other, later": noise(1e-4),
                },
            }
            for elements, slower in ((1_000, 1.0), (1 << 20, 1.4))
        ]
    }
    sections["runtimes"] = {
        "rows": [
            {
                "case": f"{elements:,}, {when}",
                "when": when,
                "elements": elements,
                "seconds": {
                    "alone": [1e-4] * 9,
                    "torch before": [(1 if when == "later" else 3) * 1e-4] * 9,
                    "scikit-learn after": [1.07e-4] * 9,
                },
            }
            for elements in (1 << 15, 1 << 20, 1 << 24)
            for when in ("right after", "later")
        ],
        "not_run": {"both after": "why not"},
    }
    sections["adapters"] = {
        "rows": [
            *(
                {
                    "adapter": adapter,
                    "case": f"{tensors} x {elements}",
                    "dtype": "float32",
                    "tensors": tensors,
                    "elements": elements,
                    "seconds": {adapter: noise(1e-3)} | {peer: noise(9e-3) for peer in peers},
                    "not_run": {},
                }
                for adapter, tensors, elements, peers in (
                    ("fusedadam.torch", 1_000, 1_000, ("torch fused", "torch default")),
                    ("fusedadam.torch", 1, 1 << 26, ("torch fused", "torch default")),
                    ("fusedadam.keras", 40, 249_279, ("keras torch",)),
                )
            ),
            *(
                {
                    "contender": f"attached: {attached}",
                    "attached": attached,
                    "elements": 100_712_448,
                    "peak_bytes": 1_608_549_376 + rest,
                    "baseline_bytes": 400_000_000,
                    "expected_bytes": 12 * 100_712_448,
                }
                for attached, rest in ((False, 410_000_000), (True, 20_000_000))
            ),
        ],
        "not_run": {"a training": "why not."},
    }
    sections["storage"] = storage_results.storage()
    sections["storage_memory"] = storage_results.storage_memory()
    return {
        "format": 1,
        "date": "2026-11-25",
        "quick": False,
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.4, "governor": None},
        "software": {"python": "3.11.7", "fusedadam": {"version": "0.1.0", "isa": "avx512"}},
        "threads": 2,
        "rounds": 9,
        "seconds": 1234.5,
        "absent": ABSENT,
        "sections": sections,
    }


NAMES = ["machine", "targets", *sample()["sections"], "cost_model"]


def page_of(names: list[str]) -> str:
    """Return a page with text around its parts."""
    parts = "".join(
        f"## {n}\n\n<!-- begin {n} -->\nold {n}\n<!-- end {n} -->\n\nAfter {n}.\n\n" for n in names
    )
    return f"# Benchmarks\n\n{parts}"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write results, a page and a README, and return their paths."""
    docs, readme = tmp_path / "docs/benchmarks.md", tmp_path / "README.md"
    docs.parent.mkdir()
    docs.write_text(page_of(NAMES), encoding="utf-8")
    readme.write_text(page_of(["figures"]), encoding="utf-8")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(sample()), encoding="utf-8")
    return {
        "results": results,
        "docs": docs,
        "readme": readme,
        "plots": tmp_path / "docs/benchmarks",
    }


def run(files: dict[str, Path], *more: str) -> int:
    """Run the command on these files."""
    options = [f"--{name}={path}" for name, path in files.items() if name != "results"]
    return report.main([str(files["results"]), *options, *more])


# ---- figures -----------------------------------------------------------------------------------


def test_ratio_is_the_median_of_each_rounds_own() -> None:
    # The ratio of the medians is 1.5, but in most rounds the peer takes three times as long.
    row = {
        "seconds": {
            "fusedadam": [1.0, 2.0, 9.0, 1.0, 4.0],
            "torch fused": [3.0, 1.0, 2.0, 3.0, 12.0],
        }
    }
    figure = ratio(row, "torch fused")
    assert figure is not None
    assert figure.middle == 3.0
    assert figure.low == 0.5
    assert figure.high == 3.0
    assert ratio(row, "deepspeed") is None


def test_the_worst_case_is_shown() -> None:
    sections = sample()["sections"]
    assert slowdown_beside_runtimes(1 << 20)(sections).middle == pytest.approx(1.07)
    row = sections["at_once"]["rows"][0]
    row["seconds"]["at once"] = [3 * t for t in row["seconds"]["one after the other"]]
    assert worst_at_once(sections).middle == pytest.approx(3)


def test_no_slowdown_where_there_is_no_other_runtime() -> None:
    sections = sample()["sections"]
    with pytest.raises(NotMeasuredError, match="no step of 2M in runtimes"):
        slowdown_beside_runtimes(1 << 21)(sections)
    for row in sections["runtimes"]["rows"]:
        row["seconds"] = {"alone": row["seconds"]["alone"]}
    with pytest.raises(NotMeasuredError, match="no other runtime"):
        slowdown_beside_runtimes(1 << 20)(sections)


def test_rounds_must_be_the_same_ones() -> None:
    with pytest.raises(ValueError, match=r"one value a round each\. Received: 2 and 3 values"):
        round_by_round([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (digits(9.996), "10.0"),
        (digits(0.0), "0"),
        (digits(123456.0), "123,456"),
        (as_time(2.494e-6), "2.49 us"),
        (as_time(0.0285), "28.5 ms"),
        (as_time(3e-8), "30.0 ns"),
        (as_ratio(0.9694), "0.97"),
        (as_ratio(0.00432), "0.0043"),
        (as_error(-0.0001), "0.0 %"),
        (as_error(0.0251), "+2.5 %"),
        (as_ratio(11.52), "11.5"),
        (as_count(1 << 26), "64M"),
        (as_count(1_000_000), "1M"),
        (as_count(1_000_000_000), "1B"),
        (as_count(128_000), "128k"),
        (as_count(1 << 15), "32k"),
        (as_count(300), "300"),
        (as_bytes(1.6e12), "1.60 TB"),
    ],
)
def test_figures_are_written_to_be_read(written: str, expected: str) -> None:
    assert written == expected


# ---- tables ------------------------------------------------------------------------------------


def test_timed_table_has_time_traffic_ratios_and_reasons() -> None:
    rows = [
        {
            "case": "1 x 1M",
            "dtype": "float32",
            "elements": 1_000_000,
            "seconds": {
                "fusedadam": [1e-3, 1e-3, 1e-3],
                "traffic twin": [9e-4, 9e-4, 9e-4],
                "torch fused": [2e-3, 3e-3, 4e-3],
            },
            "not_run": {**ABSENT, "optax": "does not compile\nhere."},
        },
        {
            "case": "1 x 2M",
            "dtype": "float32",
            "elements": 2_000_000,
            "seconds": {"fusedadam": [1e-3], "traffic twin": [1e-3]},
            "not_run": ABSENT,
        },
    ]
    lines = timed_part(rows).splitlines()
    assert lines == [
        (
            "| case | fusedadam | GB/s | of the twin | torch fused / fusedadam "
            "| deepspeed / fusedadam | optax / fusedadam |"
        ),
        "|---|---|---|---|---|---|---|",
        "| 1 x 1M | 1.00 ms | 28.0 | 0.90 (0.90 to 0.90) | 3.00 (2.50 to 3.50) | — | — |",
        "| 1 x 2M | 1.00 ms | 56.0 | 1.00 (1.00 to 1.00) | — | — | — |",
        "",
        "- not run: deepspeed (ModuleNotFoundError: No module named 'deepspeed' (not installed))",
        "- not run on 1 x 1M: optax (does not compile here)",
        "- not run on 1 x 2M: torch fused, optax (not among the contenders there)",
    ]


def test_targets_are_met_missed_or_not_measured() -> None:
    row = {
        "tensors": 1,
        "elements": 10_000,
        "seconds": {"fusedadam": [1.0, 1.0], "torch fused": [8.0, 12.0], "numba": [0.9, 0.898]},
        "not_run": ABSENT,
    }
    targets = [
        Target(peer, f"at least {bound} x", "sizes", times(peer, "sizes", 1, 10_000), bound)
        for peer, bound in (("torch fused", 10.0), ("numba", 0.9), ("deepspeed", 1.0))
    ]
    text = targets_part({"sizes": {"rows": [row]}}, targets)
    assert text.splitlines()[2:] == [
        "| torch fused | at least 10.0 x | 10.0 (9.00 to 11.0) | met |",
        # The unrounded figure decides, not its two decimals.
        "| numba | at least 0.9 x | 0.90 (0.90 to 0.90) | **MISSED** |",
        (
            "| deepspeed | at least 1.0 x | — | not measured: ModuleNotFoundError: "
            "No module named 'deepspeed' (not installed) |"
        ),
        "",
        "1 met, 1 missed, 1 not measured.",
    ]


def test_every_target_has_a_figure_in_full_results() -> None:
    document = sample()
    for target in TARGETS:
        if "deepspeed" not in target.rule:
            target.figure(document["sections"])


def test_a_table_of_an_adapter_names_it_and_what_was_not_run() -> None:
    row = {
        "adapter": "fusedadam.torch",
        "case": "1 x 1M",
        "dtype": "float32",
        "elements": 1_000_000,
        "seconds": {"fusedadam.torch": [1e-3, 1e-3], "torch fused": [2e-3, 2e-3]},
        "not_run": {},
    }
    absent = {
        "adapter": "fusedadam.keras",
        "case": "a model",
        "dtype": "float32",
        "elements": 1_000_000,
        "seconds": {},
        "not_run": dict.fromkeys(("fusedadam.keras", "keras torch"), "no keras"),
    }
    peak = {
        "contender": "attach",
        "attached": True,
        "elements": 1_000_000,
        "peak_bytes": 113_000_000,
        "baseline_bytes": 100_000_000,
        "expected_bytes": 12_000_000,
    }
    results = {"rows": [row, absent, peak], "not_run": {"backward, then step": "no memory."}}
    assert adapters_part(results).splitlines() == [
        "| case | fusedadam.torch | GB/s | torch fused / fusedadam.torch |",
        "|---|---|---|---|",
        "| 1 x 1M | 1.00 ms | 28.0 | 2.00 (2.00 to 2.00) |",
        "",
        "| case | fusedadam.keras | GB/s | keras torch / fusedadam.keras |",
        "|---|---|---|---|",
        "| a model | — | — | — |",
        "",
        "- not run: fusedadam.keras, keras torch (no keras)",
        "",
        "| training | parameters | parameters and moments | at peak | beyond |",
        "|---|---|---|---|---|",
        "| attach | 1M | 12.0 MB | 13.0 MB | 1.00 MB |",
        "",
        "- not run: backward, then step (no memory)",
    ]


def test_what_attach_saves_is_counted_in_gradients() -> None:
    rows = sample()["sections"]["adapters"]["rows"]
    figure = gradients_saved(100_000_000)
    saved = figure({"adapters": {"rows": rows}}).middle
    assert saved == pytest.approx(390_000_000 / (4 * 100_712_448))
    with pytest.raises(NotMeasuredError, match="no two peaks at 100M"):
        figure({"adapters": {"rows": rows[:-1]}})


def test_an_adapter_that_was_not_run_says_why() -> None:
    row = {
        "adapter": "fusedadam.keras",
        "tensors": 40,
        "elements": 250_000,
        "seconds": {"keras torch": [1.0]},
        "not_run": {"fusedadam.keras": "wrong result: off"},
    }
    figure = adapter_times("keras torch", "fusedadam.keras", 40, 250_000)
    with pytest.raises(NotMeasuredError, match="wrong result: off"):
        figure({"adapters": {"rows": [row]}})
    with pytest.raises(NotMeasuredError, match="no section adapters"):
        figure({})


def test_a_size_is_found_by_its_elements_and_not_by_its_name() -> None:
    figure = times("torch fused", "sizes", 1, 1 << 26)
    for elements in (64_000_000, 1 << 26):
        row = {"elements": elements, "seconds": {"fusedadam": [1.0], "torch fused": [2.0]}}
        assert figure({"sizes": {"rows": [row]}}).middle == 2.0


def test_a_quick_run_says_so() -> None:
    assert "no figure here means anything" in machine_part({**sample(), "quick": True})
    assert "no figure here means anything" not in machine_part(sample())


def test_a_section_of_another_day_says_so() -> None:
    document = sample()
    assert "| date | 2026-11-25 |" in machine_part(document).splitlines()
    document["sections"]["tail"]["date"] = document["sections"]["calls"]["date"] = "2026-11-24"
    document["sections"]["sizes"]["date"] = "2026-11-25"
    lines = machine_part(document).splitlines()
    assert "| date | 2026-11-25; tail, calls: 2026-11-24 |" in lines
    assert figures_part(document).endswith("2026-11-24, 2026-11-25, AMD EPYC, 2 threads.")


def test_machine_is_described_in_words() -> None:
    lines = machine_part(sample()).splitlines()
    assert "| memory (GiB) | 23.4 |" in lines
    assert "| governor | unknown |" in lines
    assert "| software | python 3.11.7, fusedadam (version 0.1.0, isa avx512) |" in lines
    assert "| duration of this run | 20.6 minutes |" in lines


# ---- pages -------------------------------------------------------------------------------------


def test_parts_are_replaced_and_the_text_around_them_is_not(files: dict[str, Path]) -> None:
    assert run(files) == 0
    text = files["docs"].read_text(encoding="utf-8")
    assert markers(text) == NAMES
    for name in NAMES:
        assert f"\nold {name}\n" not in text
        assert f"<!-- end {name} -->\n\nAfter {name}.\n\n" in text
        text = with_part(text, name, "")
    emptied = page_of(NAMES)
    for name in NAMES:
        emptied = with_part(emptied, name, "")
    assert text == emptied
    assert "old figures" not in files["readme"].read_text(encoding="utf-8")


def test_plots_are_drawn_and_shown(files: dict[str, Path]) -> None:
    assert run(files) == 0
    text = files["docs"].read_text(encoding="utf-8")
    drawn = sorted(files["plots"].iterdir())
    assert len(drawn) == len(PLOTS) + 1
    for plot in drawn:
        png = plot.read_bytes()
        assert png.startswith(b"\x89PNG")
        # The first chunk of a PNG starts with the width.
        assert abs(int.from_bytes(png[16:20], "big") - 1200) <= 10
        assert len(png) < 150_000
        assert f"](benchmarks/{plot.name})" in text
    assert "](docs/benchmarks/sizes.png)" in files["readme"].read_text(encoding="utf-8")


def test_the_same_results_change_nothing_again(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, "--check") == 1
    assert "old sizes" in files["docs"].read_text(encoding="utf-8")
    assert not files["plots"].exists()
    assert run(files) == 0
    assert run(files, "--check") == 0
    capsys.readouterr()
    (files["plots"] / "sizes.png").unlink()
    assert run(files, "--check") == 1
    assert "missing: " in capsys.readouterr().out


def test_what_a_run_lacks_is_kept_and_said(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    document = sample()
    for name in ("memory", "threads"):
        del document["sections"][name]
    files["results"].write_text(json.dumps(document), encoding="utf-8")
    assert run(files) == 0
    text = files["docs"].read_text(encoding="utf-8")
    for name in ("memory", "threads", "targets", "cost_model"):
        assert f"\nold {name}\n" in text
    assert "shown as an earlier one had it: targets, threads, memory, cost_model." in text
    out = capsys.readouterr().out
    assert "note: memory: kept as it was, since these results do not have it" in out
    assert "note: targets: kept as it was, since these results lack memory" in out
    assert "note: cost_model: kept as it was, since these results lack threads" in out


def test_a_section_without_a_place_is_an_error(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of([name for name in NAMES if name != "tail"])
    files["docs"].write_text(page, encoding="utf-8")
    assert run(files) == 2
    assert "must have a line <!-- begin tail -->" in capsys.readouterr().err
    assert files["docs"].read_text(encoding="utf-8") == page


def test_a_section_that_no_table_is_for_is_an_error(files: dict[str, Path]) -> None:
    document = sample()
    document["sections"]["weather"] = {"rows": []}
    with pytest.raises(ReportError, match=r"sections must be among .* Received: weather"):
        make_report(document, files["docs"], files["plots"], None)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- begin a -->\n",
        "<!-- begin a -->\n<!-- begin b -->\n<!-- end a -->\n<!-- end b -->\n",
        "<!-- begin a -->\n<!-- end a -->\n<!-- begin a -->\n<!-- end a -->\n",
    ],
)
def test_broken_markers_are_refused(text: str) -> None:
    with pytest.raises(ReportError, match="<!-- begin a --> must be"):
        markers(text)


def test_results_of_another_format_are_refused(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files["results"].write_text('{"format": 2}', encoding="utf-8")
    assert run(files) == 2
    assert "must have format 1. Received: 2" in capsys.readouterr().err
