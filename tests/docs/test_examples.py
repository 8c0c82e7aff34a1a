# SPDX-License-Identifier: MIT
"""The examples, but for the first, run as a user runs them. Stage `readme-example` runs that one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 120


def run(
    *arguments: str | Path, directory: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=inherited | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stderr}"
        assert "Warning" not in done.stderr
    return done


def assert_png(plot: Path) -> None:
    assert plot.read_bytes().startswith(b"\x89PNG")


# -- sparse steps of a table ----------------------------------------------------------------------


def test_both_trainings_of_the_table_learn(tmp_path: Path) -> None:
    embedding = ROOT / "examples/train_embedding.py"
    printed = run(embedding, "--batches=100", directory=tmp_path).stdout
    errors = re.findall(r"held-out error ([0-9.]+)$", printed, re.MULTILINE)
    assert len(errors) == 2
    assert max(map(float, errors)) < 0.95  # 1 before the first step, the spread of the ratings
    assert_png(tmp_path / "train_embedding.png")


# -- distributed training, and the snippets of docs/scaling.md ----------------------------------

DISTRIBUTED = ROOT / "examples/train_distributed.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--steps=12", "--layers=1", "--width=32", "--evaluate-every=6", "--save-every=6"]


def held_out(output: str) -> float:
    found = re.search(r"^Held-out loss after step 12: ([0-9.]+) bits a byte$", output, re.MULTILINE)
    assert found
    return float(found[1])


def test_distributed_goes_on_with_other_ranks_and_the_other_sharding(tmp_path: Path) -> None:
    whole = run(*TORCHRUN, DISTRIBUTED, *SMALL, directory=tmp_path).stdout
    assert_png(tmp_path / "train_distributed.png")
    assert "Training: 100%" not in whole  # that is on stderr
    state = r"^State of the optimizer: rank 0 has ([0-9.]+) MB, rank 1 has ([0-9.]+) MB$"
    sizes = re.search(state, whole, re.MULTILINE)
    assert sizes
    assert float(sizes[1]) == pytest.approx(float(sizes[2]), rel=0.2)

    half = tmp_path / "train_distributed/step-000006"
    assert half.is_dir()
    # The same 12 batches; only the sums of gradients are rounded differently. A resumed training
    # that has lost its moments or its learning rate is off by 0.04 or more.
    goes_on = [*SMALL, f"--resume={half}"]
    sharded = [*goes_on, "--checkpoints=fsdp", "--sharding=fsdp"]
    resumed = [
        run(DISTRIBUTED, *goes_on, "--checkpoints=alone", directory=tmp_path),
        run(*TORCHRUN, DISTRIBUTED, *sharded, directory=tmp_path),
    ]
    losses = [held_out(done.stdout) for done in resumed]
    assert losses == pytest.approx([held_out(whole)] * 2, abs=2e-3)


def test_snippets_of_the_page_are_one_program(tmp_path: Path) -> None:
    page = (ROOT / "docs/scaling.md").read_text("utf-8")
    snippets = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    program = tmp_path / "program.py"
    program.write_text("\n".join(snippets), "utf-8")
    run(*TORCHRUN, program, directory=tmp_path)


# -- training with less memory ------------------------------------------------------------------

SMALL_MEMORY = ROOT / "examples/train_small_memory.py"


def table(*arguments: str, directory: Path) -> dict[str, list[float]]:
    """Run the example and return the rows that it prints."""
    done = run(SMALL_MEMORY, "--steps=3", "--memory=60MB", *arguments, directory=directory)
    names, *rows, plot = done.stdout.splitlines()
    assert names.split() == [*([] if "--largest" in arguments else ["float32"]), "small", "memory"]
    assert_png(directory / plot.removeprefix("Plot: "))
    return {row[:32].strip(): [float(value) for value in row[32:].split()] for row in rows}


def test_both_trainings_learn_the_same_in_16_and_7_bytes(tmp_path: Path) -> None:
    rows = table("--plot=losses.png", directory=tmp_path)
    assert rows["Bytes a parameter, all tensors"] == pytest.approx([16, 7], abs=0.02)
    exact, small = rows["Loss of the last steps, bits"]
    assert small == pytest.approx(exact, abs=0.05)
    assert exact < 8  # that of bytes drawn at random
    if sys.platform == "linux":
        more, less = rows["Bytes a parameter, measured"]
        assert less < more - 5  # of 9; the rest is other memory of the process
        assert max(rows["Peak with activations, MB"]) < 60


def test_largest_model_without_gradients_takes_5_bytes(tmp_path: Path) -> None:
    both = table("--attach", directory=tmp_path)
    assert both["Bytes a parameter, all tensors"] == pytest.approx([12, 5], abs=0.02)
    largest = table("--attach", "--largest", directory=tmp_path)
    assert largest["Bytes a parameter, all tensors"] == pytest.approx([5], abs=0.02)
    assert largest["Million parameters"][0] > 1.5 * both["Million parameters"][0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--memory=60", "invalid bytes_in value"), ("--memory=1MB", "too little"), ("--steps=0", "1")],
)
def test_invalid_arguments_are_named(argument: str, message: str, tmp_path: Path) -> None:
    done = run(SMALL_MEMORY, argument, directory=tmp_path, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
