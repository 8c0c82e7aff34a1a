# SPDX-License-Identifier: MIT
"""The checkpoint reader with randomly mutated files: libFuzzer's job, without its guidance.

Runs without atheris. `fuzz_checkpoint.py` finds more.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
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
