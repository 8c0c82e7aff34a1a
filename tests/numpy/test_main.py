# SPDX-License-Identifier: MIT
"""The report for bugs, what an import brings in, and the errors of a broken installation."""

from __future__ import annotations

import itertools
import platform
import re
import subprocess
import sys
from pathlib import Path

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of
from fusedadam import __main__ as bug_report
from fusedadam import _core, bench, check
from helpers import running


def facts_of(text: str) -> dict[str, str]:
    """Parse the report's lines: a name in the first 17 characters, then its value."""
    return {line[:17].strip(): line[17:] for line in text.splitlines()}


def test_the_report_has_all_facts() -> None:
    command = [sys.executable, "-W", "error", "-m", "fusedadam"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    facts = facts_of(done.stdout)
    assert list(facts)[:2] == ["fusedadam", "compiler"]
    assert facts["fusedadam"] == fusedadam.__version__
    assert facts["numpy"] == np.__version__
    assert facts["python"] == platform.python_version()
    assert tuple(facts["instruction sets"].split(", ")) == fusedadam.supported_isas()
    assert facts["active"] in fusedadam.supported_isas()
    assert int(facts["threads"]) >= 1
    assert facts["threading"].startswith(("OpenMP ", "std::thread"))
    assert facts["cpu quota"] == "none" or float(facts["cpu quota"]) > 0
    assert all(facts[name] for name in ("compiler", "cpu", "system"))


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "cpu"),
    [
        ("processor\t: 0\nmodel name\t: A CPU: 3 GHz\nmodel name\t: B\n", "unused", "A CPU: 3 GHz"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "the processor", "the processor"),
        (None, "the processor", "the processor"),
        (None, "", platform.machine()),
    ],
    ids=["x86", "Arm, which has no names", "no such file", "no name at all"],
)
def test_the_cpu_is_named_as_the_system_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, processor: str, cpu: str
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(bug_report, "Path", lambda _: file)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    assert bug_report._cpu() == cpu


@pytest.mark.parametrize(("quota", "said"), [(None, "none"), (2.0, "2.0"), (1 / 3, "0.33")])
def test_the_cpu_quota_is_said_in_cpus(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quota: float | None,
    said: str,
) -> None:
    monkeypatch.setattr(_core, "cpu_quota", lambda: quota)
    assert bug_report.main([]) == 0
    assert facts_of(capsys.readouterr().out)["cpu quota"] == said


@pytest.mark.parametrize("installed", [True, False])
def test_the_check_finds_the_published_bits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setattr(check, "find_spec", lambda _: None)
    isas = fusedadam.supported_isas()
    with running():
        assert bug_report.main(["check"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"instruction sets: {', '.join(isas)} (active: {fusedadam.active_isa()})"
    assert installed or lines.pop() == "bfloat16 was left out: it needs ml_dtypes"
    assert all(line.endswith("as published") for line in lines)
    dtypes = list(check.PUBLISHED)[: 1 + installed]
    expected = itertools.product(isas, sorted({1, 2, fusedadam.get_num_threads()}), dtypes)
    found = [re.fullmatch(r"(\w+), (\d+) threads, (\w+): .*", line) for line in lines]
    assert [m and m.groups() for m in found] == [(i, str(n), d) for i, n, d in expected]


def test_the_check_fails_by_other_bits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "PUBLISHED", {"numpy": "0"})
    with running():
        assert bug_report.main(["check", "--isa", "baseline", "--threads", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("NOT AS PUBLISHED")


def test_the_bench_measures_each_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SIZES", {"small": 10, "larger": 100})
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    assert bug_report.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"{fusedadam.get_num_threads()} threads, float32")
    assert re.fullmatch(r"small +10 +[\d.]+ us +[\d.]+", lines[2])
    assert re.fullmatch(r"larger +100 +[\d.]+ us +[\d.]+ +[\d.]+ GB/s", lines[3])


BROKEN_IMPORT = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "fusedadam._core":
                raise ModuleNotFoundError("No module named {missing!r}", name={missing!r})

    sys.meta_path.insert(0, Missing())
    try:
        import fusedadam
    except ImportError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("fusedadam._core", "ImportError the compiled part of fusedadam is missing: install"),
        ("numpy", "ModuleNotFoundError No module named 'numpy'"),
    ],
)
def test_import_says_what_is_missing(missing: str, said: str) -> None:
    assert output_of(BROKEN_IMPORT.format(missing=missing)).startswith(said)


def test_import_and_steps_bring_in_no_framework() -> None:
    code = """
        import sys
        import numpy as np
        import fusedadam
        p, g = np.ones(3), np.ones(3)
        optimizer = fusedadam.Adam(clipnorm=1.0)
        optimizer.get_updates([g], [p])
        optimizer.apply_gradients([(g, p)])
        optimizer.get_gradients([g], [p])
        frameworks = {"torch", "autograd", "keras", "tf_keras", "jax", "tensorflow", "scipy"}
        print(sorted(frameworks & {name.partition(".")[0] for name in sys.modules}))
    """
    assert output_of(code) == "[]"
