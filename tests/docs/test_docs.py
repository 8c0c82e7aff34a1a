# SPDX-License-Identifier: MIT
"""The documentation's examples run, and the README names every public member and option."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import runpy
from importlib import metadata
from pathlib import Path
from typing import Any

import fusedadam
import fusedadam.adam
import fusedadam.optimizer
import numpy as np
import pytest
from fresh_python import output_of
from fusedadam._core import AdamOptions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# Frameworks imported by examples, and clients of torch's optimizers.
NEEDS = re.compile(r"^import (torch|jax|keras|peft|transformers)$", re.MULTILINE)
CLIENTS = {"peft", "transformers"}


def examples(kind: str) -> list[Any]:
    """The examples of all pages of one kind: "plain", "framework" or "client"."""

    def kind_of(code: str) -> str:
        needs = set(NEEDS.findall(code))
        return "client" if needs & CLIENTS else "framework" if needs else "plain"

    return [
        pytest.param(code, id=f"{page.name}-{i}")
        for page in PAGES
        for i, code in enumerate(blocks(page, "python"))
        if kind_of(code) == kind
    ]


def run(code: str, directory: Path) -> dict[str, Any]:
    """Run an example from a file, as a user would, and return its globals."""
    file = directory / "example.py"
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file))


@pytest.mark.parametrize("code", examples("plain"))
def test_python_example_runs(code: str, tmp_path: Path) -> None:
    run(code, tmp_path)


@pytest.mark.parametrize("code", examples("framework"))
def test_python_example_of_a_framework_runs(code: str) -> None:
    needs = NEEDS.findall(code)
    for framework in (*needs, *(["torch"] if "keras" in needs else [])):  # Keras runs on torch
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"needs {framework}")
    # In a separate process, because Keras chooses its backend when it is imported.
    output_of(code)


# Ignore the warnings that clients raise themselves.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("code", examples("client"))
def test_python_example_of_a_client_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in NEEDS.findall(code):
        pytest.importorskip(client)
    monkeypatch.chdir(tmp_path)
    run(code, tmp_path)


def test_versions_of_clients_are_those_of_their_tests() -> None:
    group = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nclients = [")[2]
    pins = set(re.findall(r'"((?!torch)\S+)==(\S+)"', group.partition("]")[0]))
    table = (ROOT / "docs/interfaces.md").read_text(encoding="utf-8").partition("## Clients\n")[2]
    assert pins
    assert set(re.findall(r"^\| (\S+) ([\d.]+) \|", table, re.MULTILINE)) == pins


def test_readme_fit_finds_the_line(tmp_path: Path) -> None:
    params = run(blocks(PAGES[0], "python")[0], tmp_path)["params"]
    np.testing.assert_allclose([*params["w"], *params["b"]], [3.0, 0.5], atol=1e-3)


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_readme_example_is_the_one_that_the_consumer_project_builds_and_runs(language: str) -> None:
    (code,) = blocks(PAGES[0], language)
    built = (ROOT / f"tests/cpp/consumer/readme.{language}").read_text(encoding="utf-8")
    assert built == code


def test_a_package_index_shows_the_readme_without_links_that_it_would_break() -> None:
    shown = str(metadata.metadata("fusedadam").json["description"])
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert code.findall(shown) == code.findall(README)
    links = re.findall(r"\]\(([^)]*)\)", code.sub("", shown))
    assert links == []
    assert "![" in README
    assert "![" not in shown


def test_docstring_examples() -> None:
    for module in (fusedadam.adam, fusedadam.optimizer):
        results = doctest.testmod(module)
        assert results.attempted > 0
        assert results.failed == 0


def test_readme_table_names_every_public_member() -> None:
    members = [
        name
        for name, value in inspect.getmembers(fusedadam.Adam)
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    ]
    assert members
    assert [
        name for name in members if f"`{name}" not in README and f".{name}(" not in README
    ] == []


def test_readme_table_gives_every_option_and_its_default() -> None:
    table = README.partition("## Options\n")[2].partition("\n## ")[0]
    named = re.findall(
        r"(\w+)=([^,`]+)", "".join(re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE))
    )
    defaults = AdamOptions().as_dict()
    for name in ("lr", "beta_1", "beta_2", "epsilon", "decay"):
        del defaults[name]
    assert {name: ast.literal_eval(value) for name, value in named} == defaults


def test_reliability_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    # Without the paths in a build directory.
    files = set(re.findall(r"(?<!/)\btests/[\w/.]+", text))
    assert len(files) > 20
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    for file, test in re.findall(r"\b(tests/[\w/.]+)::(\w+)", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
    suites = set(re.findall(r"`(\w+)\.\*`", text))
    cpp = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/cpp").rglob("*.cpp"))
    assert suites
    assert [name for name in sorted(suites) if f"({name}, " not in cpp] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
