# SPDX-License-Identifier: MIT
"""The checkpoint reader with randomly mutated files: libFuzzer's job, without its guidance.

Runs without atheris, and checks that the rules detect faults. `fuzz_checkpoint.py` finds more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fusedadam import checkpoint, tensor_file
from fuzz_checkpoint_files import blindly, loads, mutated, seeds
from fuzz_runs import SEED, examples, tally


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def test_good_files_load(tmp_path: Path, good: list[bytes]) -> None:
    # Files whose lr is a schedule only load if lr is given, as it is for half of all files.
    refused = [content for content in good if not loads(tmp_path / "file", content)]
    schedules = [content for content in good if b"math:erf" in content]
    assert 0 < len(refused) < len(schedules) < len(good)
    assert all(content in schedules for content in refused)


def test_changed_files_load_or_are_refused(tmp_path: Path, good: list[bytes]) -> None:
    rng = random.Random(SEED)
    counts = tally("test_changed_files_load_or_are_refused")
    for _ in range(examples(250)):
        content = mutated(rng.choice(good), rng, blindly)
        counts["files"] += 1
        counts["files that load"] += loads(tmp_path / "file", content)
    # Some mutations do not change what a file says.
    assert 0.02 < counts["files that load"] / counts["files"] < 0.5


def always(*_: Any) -> bool:
    return True


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "names that stand twice": (tensor_file, "_unique", dict),
    "any shapes and offsets": (tensor_file, "_are_sizes", always),
    "any positions": (checkpoint, "_is_position", always),
    "tensors anywhere": (tensor_file, "_require_no_gap", always),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_rules_find_a_reader_that_takes(
    tmp_path: Path,
    good: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    fault: tuple[Any, str, Callable[..., Any]],
) -> None:
    monkeypatch.setattr(*fault)
    rng = random.Random(0)
    # Each fault is found within about 200 files.
    with pytest.raises(Exception):  # noqa: B017, PT012 (any failure)
        for _ in range(2000):
            loads(tmp_path / "file", mutated(rng.choice(good), rng, blindly))
