# SPDX-License-Identifier: MIT
"""Tests of the report: figures of known numbers, tables, targets and parts of a page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
for needed in ("matplotlib", "scipy", "tabulate"):
    pytest.importorskip(needed)

import report
import sections
from reporting import costs, data, tables
from reporting.targets import TARGETS, Target, largest, of_row, targets_part
from run import FORMAT
from runner import Bench, contestant
from sections import frameworks, memory, neighbours, storage, trainings

CONSTANTS = {"call": 2e-6, "fork": 3e-6, "tensor": 9e-8, "rate": 2.9e9}
ABSENT = {"deepspeed": "ModuleNotFoundError: No module named 'deepspeed'.\n(not | here)"}


def row(case: str, elements: int, seconds: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row as `run.py` writes it, with the same time in each of three rounds."""
    times = {name: [x] * 3 if isinstance(x, float) else x for name, x in seconds.items()}
    fixed = {"dtype": "float32", "threads": 2, "tensors": 1, "not_run": {}}
    return {"case": case, "elements": elements, "seconds": times, **fixed, **more}


class Steps:
    """A contest of the model's own predictions, in which a round's weather slows all equally."""

    def row(self, _bench: Bench, names: Any, sizes: Any, **more: Any) -> dict[str, Any]:
        n, threads = sum(sizes), more.get("threads", 2)
        twin = 1e-7 + n * (28 / 53e9 if n > 4e6 else 0.7 / (CONSTANTS["rate"] * threads))
        one = {"tensors": len(sizes), "elements": n, "threads": threads, "twin": twin}
        ours = twin * costs.predicted(pd.DataFrame([one]), CONSTANTS)[0]
        times = {name: twin if name == "traffic twin" else 2 * ours for name in names}
        times |= {name: ours for name in names if name.startswith("fusedadam")}
        seconds = {name: [0.8 * t, 1.5 * t, t] for name, t in times.items()}
        held = {"held_bytes": dict.fromkeys(names, 8 * n)} if "count_bytes" in more else {}
        case = more.get("case") or f"{len(sizes):,} x {sizes[0]:,}"
        shape = {"tensors": len(sizes), "threads": threads, **held}
        return row(case, sizes[0], seconds, **shape, dtype=more.get("dtype", "float32"))


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The results of a run of all sections, whose measurements are invented."""
    peak = {"baseline_bytes": 10**8, "peak_bytes": 5 * 10**9, "held_bytes": 2**31}
    found: dict[Any, Any] = {
        contestant.peak: (10**8, 5 * 10**9),
        memory.step_whole_and_part: {"fusedadam": [2.0], "part": [1.0]},
        frameworks.measure: {**peak, "loss": 1.0},
        storage.step_largest: {**peak, "step_seconds": 1.5},
        neighbours.time_at_once: {"at once": 2.0, "one after the other": 2.0},
    }
    for module in (memory, frameworks, storage, neighbours, trainings):
        for name in ("too_large", "absence"):
            monkeypatch.setattr(module, name, lambda *_: "", raising=False)
        monkeypatch.setattr(module, "call", lambda function, *_, **__: copy.copy(found[function]))
    kinds = ("seconds", "cpu_seconds", "faults")
    monkeypatch.setattr(
        trainings,
        "call",
        lambda _, names, *__, **___: {kind: {n: [1.0] for n in names} for kind in kinds},
    )
    monkeypatch.setattr(memory, "first_steps", lambda *_: [[1.0, 2.0, 2.0]] * 2)
    invented = {
        "runtimes": [
            row(f"{n:,}", n, {"alone": 1.0, "torch": 1.05}) for n in (1 << 15, 1 << 20, 1 << 24)
        ],
        "ranks": [row("67,108,864", 1 << 26, {"one process": 1.0, "2 processes": 2.0})],
        "imports": [row("imports", 0, {"import numpy": 0.1, "import fusedadam": 0.01})],
    }
    bench = Bench(Steps(), threads=2, rounds=1)  # type: ignore[arg-type]
    for name in sections.SECTIONS.keys() - invented.keys():
        invented[name] = sections.load(name)(bench)
    dated = {name: {"date": "2026-11-25", "rows": rows} for name, rows in invented.items()}
    described = {"machine": {"CPU": "AMD EPYC"}, "software": {"python": "3.11"}, "absent": ABSENT}
    shape = {"format": FORMAT, "date": "2026-11-25", "threads": 2, "rounds": 3, "seconds": 600.0}
    return {**shape, **described, "quick": False, "sections": dated}


def plain(text: str) -> list[str]:
    """The lines of a table without padding."""
    return [re.sub(" +", " ", line) for line in text.splitlines()]


def test_figures_are_written_to_be_read() -> None:
    numbers = (9.996, 123456.0, 0.02714)
    assert [data.digits(x) for x in numbers] == ["10.0", "123,456", "0.0271"]
    seconds = (1.5, 0.0285, 2.494e-6, 3e-8)
    assert [data.as_time(x) for x in seconds] == ["1.50 s", "28.5 ms", "2.49 us", "30.0 ns"]
    assert [data.as_ratio(x) for x in (0.9694, 11.52)] == ["0.97", "11.5"]
    counts = (1 << 26, 10**9, 1 << 15, 300)
    assert [data.as_count(x) for x in counts] == ["64M", "1B", "32k", "300"]
    assert [data.as_bytes(x) for x in (1.6e12, 4e5)] == ["1.60 TB", "0.4 MB"]
    assert data.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 (2.00 to 4.00)"


def test_ratio_is_the_median_of_each_rounds_own() -> None:
    # The ratio of the medians is 1.5, but in most rounds the peer takes three times as long.
    times = {"fusedadam": [1.0, 2.0, 9.0, 1.0, 4.0], "torch fused": [3.0, 1.0, 2.0, 3.0, 12.0]}
    values = data.ratio(row("", 1, times), "torch fused")
    assert values.median() == 3.0
    assert largest([values / 2, values]) is values
    with pytest.raises(data.NotMeasuredError, match="deepspeed was not run"):
        data.ratio(row("", 1, times), "deepspeed")


def test_table_has_time_traffic_ratios_and_reasons() -> None:
    seconds = {"fusedadam": 1e-3, "traffic twin": 9e-4, "torch fused": [2e-3, 3e-3, 4e-3]}
    rows = [
        row("a", 1_000_000, seconds, not_run={"optax": "does not compile\nhere."}),
        row("b", 2_000_000, {"fusedadam": 1e-3}, not_run=ABSENT),
    ]
    lines = plain(tables.steps_table(rows))
    assert lines[0] == "| case | fusedadam | GB/s | of the twin | torch fused | deepspeed | optax |"
    assert lines[2] == "| a | 1.00 ms | 28.0 | 0.90 | 3.00 (2.50 to 3.50) | — | — |"
    assert lines[3] == "| b | 1.00 ms | 56.0 | — | — | — | — |"
    why = "ModuleNotFoundError: No module named 'deepspeed'. (not / here)"
    assert lines[5] == "- not run on a: optax (does not compile here)"
    assert lines[6] == f"- not run on b: deepspeed ({why})"


def test_targets_are_met_missed_or_not_measured() -> None:
    seconds = {"fusedadam": 1.0, "torch fused": [8.0, 12.0, 10.0], "numba": 0.8999}
    results = {"sizes": {"rows": [row("x", 1, seconds, not_run=ABSENT)]}}
    bounds = {"torch fused": 10.0, "numba": 0.9, "deepspeed": 1.0}
    figures = [of_row(("sizes", "x"), lambda row, p=p: data.ratio(row, p)) for p in bounds]  # type: ignore[misc]
    targets = tuple(Target(p, "", f, b) for (p, b), f in zip(bounds.items(), figures, strict=True))
    lines = plain(targets_part(results, targets))[2:]
    # The unrounded figure decides, not its two decimals.
    assert lines[0] == "| torch fused | | 10.0 (9.00 to 11.0) | met |"
    assert lines[1] == "| numba | | 0.90 | **MISSED** |"
    assert "| not measured: ModuleNotFoundError" in lines[2]
    assert lines[4] == "1 met, 1 missed, 1 not measured."


def test_a_full_run_has_every_target(document: dict[str, Any]) -> None:
    lines = plain(targets_part(document["sections"]))
    # This machine may lack an instruction set.
    assert [x for x in lines if "not measured:" in x and "AVX-512" not in x] == []
    assert len(lines) == len(TARGETS) + 4 == 58
    for line in (
        "| one tensor, 64M | at least 1 x torch fused | 2.00 | met |",
        "| 1B parameters | time grows linearly from 64M within 10 % | 0.13 | **MISSED** |",
        "| packed, 2.5B parameters | a step in at most 24 GiB | 4.66 GiB | met |",
        "| `import fusedadam` | at most 60 ms beyond `import numpy` | 10.0 ms | met |",
        "| 1M, next to torch or scikit-learn (worst case) | at most 1.1 x alone | 1.05 | met |",
    ):
        assert line in lines


def test_fit_recovers_the_constants_from_noisy_rounds(document: dict[str, Any]) -> None:
    samples = costs.samples_of(document["sections"])
    assert costs.fit(samples) == pytest.approx(CONSTANTS, rel=1e-3)
    noise = np.resize([1.02, 0.98, 1.0], len(samples))
    found = costs.fit(samples.assign(ratio=samples["ratio"] * noise))
    assert found == pytest.approx(CONSTANTS, rel=0.3)
    with pytest.raises(data.NotMeasuredError, match="3 steps are too few to fit 4 constants"):
        costs.fit(samples[:3])
    source = Path(__file__).parents[2] / "src/cpp/parallel/shared_pass.hpp"
    smallest = f"smallest_shared = {costs.SMALLEST_PARALLEL_STEP};"
    assert smallest in source.read_text(encoding="utf-8").replace("'", "")


def page_of(names: list[str]) -> str:
    """A page with text around its parts."""
    parts = (f"<!-- begin {n} -->\nold {n}\n<!-- end {n} -->\n\nAfter {n}.\n" for n in names)
    return "# Benchmarks\n\n" + "\n".join(parts)


def test_parts_are_replaced_and_the_text_around_them_is_not(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["machine", *tables.PARTS]
    results, docs, readme = (tmp_path / name for name in ("results.json", "docs.md", "README.md"))
    del document["sections"]["storage_memory"]
    document["sections"]["tail"]["date"] = "2026-11-24"
    results.write_text(json.dumps(document), encoding="utf-8")
    docs.write_text(page_of(names), encoding="utf-8")
    readme.write_text(page_of(["figures"]), encoding="utf-8")
    options = [f"--docs={docs}", f"--plots={tmp_path / 'plots'}", f"--readme={readme}"]
    for _ in range(2):  # the second run changes nothing
        assert report.main([str(results), *options]) == 0
        text = docs.read_text(encoding="utf-8")
        assert [n for n in names if f"old {n}\n" in text] == ["targets", "storage"]
        assert all(f"<!-- end {name} -->\n\nAfter {name}.\n" in text for name in names)
    assert "storage is kept as it was: these results lack storage_memory" in capsys.readouterr().out
    assert len(list((tmp_path / "plots").glob("*.png"))) == text.count("](plots/") == 3
    # 28 B at 80 % of 24 channels of 38.4 GB/s.
    assert "| 1B | 16.0 GB | 38.0 ms | 76.0 ms |" in plain(text)
    assert "1,685 Gbit/s" in text
    assert "- **Run:** 2026-11-25; tail: 2026-11-24, 10 minutes, 2 threads" in text
    assert "- **Parts of an earlier run:** targets, storage" in text
    assert "one tensor of 64M | 35.5 ms | 1.00 | 2.00 | 2.00 |" in plain(readme.read_text())[5]
    docs.write_text(page_of(names[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have <!-- begin machine --> once\. Received: 0"):
        report.main([str(results), *options])
    results.write_text('{"format": 1}', encoding="utf-8")
    assert report.main([str(results), *options]) == 2


def test_published_pages_have_every_part() -> None:
    docs = Path(__file__).parents[2] / "docs"
    of_quality = ["run", "formats", "losses", "tasks", "effects", "large"]
    pages = {"benchmarks.md": ["machine", *tables.PARTS], "quality.md": of_quality}
    for page, parts in pages.items():
        text = (docs / page).read_text(encoding="utf-8")
        assert report.replaced(text, dict.fromkeys(parts, "")).count("<!-- begin ") == len(parts)
