# SPDX-License-Identifier: MIT
"""The example of training with less memory: its bytes a parameter, losses and plot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parents[2] / "examples/train_small_memory.py"
SMALL = ["--steps=3", "--memory=60MB"]
TIME_LIMIT_S = 120


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAM_", "OMP_"))}
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        cwd=directory,
        env=inherited | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )


def table(*arguments: str, directory: Path) -> dict[str, list[float]]:
    """Run the example and return the rows that it prints."""
    done = run(*arguments, directory=directory)
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stderr}"
    assert "Warning" not in done.stderr
    names, *rows, plot = done.stdout.splitlines()
    assert names.split() == [*([] if "--largest" in arguments else ["float32"]), "small", "memory"]
    assert (directory / plot.removeprefix("Plot: ")).read_bytes().startswith(b"\x89PNG")
    return {row[:32].strip(): [float(value) for value in row[32:].split()] for row in rows}


def test_both_trainings_learn_the_same_in_16_and_7_bytes(tmp_path: Path) -> None:
    rows = table(*SMALL, "--plot=losses.png", directory=tmp_path)
    assert rows["Bytes a parameter, all tensors"] == pytest.approx([16, 7], abs=0.02)
    exact, small = rows["Loss of the last steps, bits"]
    assert small == pytest.approx(exact, abs=0.05)
    assert exact < 8  # that of bytes drawn at random
    if sys.platform == "linux":
        more, less = rows["Bytes a parameter, measured"]
        assert less < more - 5  # of 9; the rest is other memory of the process
        assert max(rows["Peak with activations, MB"]) < 60


def test_largest_model_without_gradients_takes_5_bytes(tmp_path: Path) -> None:
    both = table(*SMALL, "--attach", directory=tmp_path)
    assert both["Bytes a parameter, all tensors"] == pytest.approx([12, 5], abs=0.02)
    largest = table(*SMALL, "--attach", "--largest", directory=tmp_path)
    assert largest["Bytes a parameter, all tensors"] == pytest.approx([5], abs=0.02)
    assert largest["Million parameters"][0] > 1.5 * both["Million parameters"][0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--memory=60", "invalid bytes_in value"), ("--memory=1MB", "too little"), ("--steps=0", "1")],
)
def test_invalid_arguments_are_named(argument: str, message: str, tmp_path: Path) -> None:
    done = run(argument, directory=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
