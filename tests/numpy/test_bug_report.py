# SPDX-License-Identifier: MIT
"""The report for bugs, and the errors of a broken installation."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of
from fusedadam import __main__ as bug_report
from fusedadam import _core


def facts_of(text: str) -> dict[str, str]:
    """Parse the report's lines: a name in the first 17 characters, then its value."""
    return {line[:17].strip(): line[17:] for line in text.splitlines()}


def test_the_report_has_all_facts() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fusedadam"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    facts = facts_of(done.stdout)
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
    ("cpuinfo", "cpu"),
    [
        (
            "processor\t: 0\nmodel name\t: A fine CPU: 3 GHz\nmodel name\t: Another\n",
            "A fine CPU: 3 GHz",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "the processor"),
        (None, "the processor"),
    ],
    ids=["x86", "Arm, which has no names", "no such file"],
)
def test_the_cpu_is_named_as_the_system_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, cpu: str
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(bug_report, "Path", lambda _: file)
    monkeypatch.setattr(platform, "processor", lambda: "the processor")
    assert bug_report._cpu() == cpu


def test_a_cpu_without_any_name_is_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bug_report, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert bug_report._cpu() == platform.machine()


@pytest.mark.parametrize(("quota", "said"), [(None, "none"), (2.0, "2.0"), (1 / 3, "0.33")])
def test_the_cpu_quota_is_said_in_cpus(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quota: float | None,
    said: str,
) -> None:
    monkeypatch.setattr(_core, "cpu_quota", lambda: quota)
    bug_report.main()
    assert facts_of(capsys.readouterr().out)["cpu quota"] == said


def test_every_fact_is_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bug_report.main()
    assert list(facts_of(capsys.readouterr().out))[:2] == ["fusedadam", "compiler"]


# ---- a broken installation: the import says what is wrong

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


def test_an_import_without_the_compiled_part_says_what_to_do() -> None:
    said = output_of(BROKEN_IMPORT.format(missing="fusedadam._core"))
    assert said.startswith("ImportError the compiled part of fusedadam is missing: install")


def test_another_missing_module_is_named_as_it_is() -> None:
    said = output_of(BROKEN_IMPORT.format(missing="numpy"))
    assert said == "ModuleNotFoundError No module named 'numpy'"
