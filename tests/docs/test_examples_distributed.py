# SPDX-License-Identifier: MIT
"""The example of distributed training, and the snippets of docs/scaling.md, run by torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/train_distributed.py"
PAGE = ROOT / "docs/scaling.md"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--steps=12", "--layers=1", "--width=32", "--evaluate-every=6", "--save-every=6"]
TIME_LIMIT_S = 120


def run(*arguments: str | Path, directory: Path) -> str:
    """Run Python with these arguments and return its output."""
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
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stderr}"
    assert "Warning" not in done.stderr
    return done.stdout


def held_out(output: str) -> float:
    found = re.search(r"^Held-out loss after step 12: ([0-9.]+) bits a byte$", output, re.MULTILINE)
    assert found
    return float(found[1])


def test_example_goes_on_with_other_ranks_and_the_other_sharding(tmp_path: Path) -> None:
    whole = run(*TORCHRUN, EXAMPLE, *SMALL, directory=tmp_path)
    plot = tmp_path / "train_distributed.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "Training: 100%" not in whole  # that is on stderr
    sizes = re.search(
        r"^State of the optimizer: rank 0 has ([0-9.]+) MB, rank 1 has ([0-9.]+) MB$",
        whole,
        re.MULTILINE,
    )
    assert sizes
    assert float(sizes[1]) == pytest.approx(float(sizes[2]), rel=0.2)

    half = tmp_path / "train_distributed/step-000006"
    assert half.is_dir()
    # The same 12 batches; only the sums of gradients are rounded differently. A resumed training
    # that has lost its moments or its learning rate is off by 0.04 or more.
    goes_on = [*SMALL, f"--resume={half}"]
    alone = run(EXAMPLE, *goes_on, "--checkpoints=alone", directory=tmp_path)
    assert held_out(alone) == pytest.approx(held_out(whole), abs=2e-3)
    sharded = run(
        *TORCHRUN, EXAMPLE, *goes_on, "--checkpoints=fsdp", "--sharding=fsdp", directory=tmp_path
    )
    assert held_out(sharded) == pytest.approx(held_out(whole), abs=2e-3)


def test_snippets_of_the_page_are_one_program(tmp_path: Path) -> None:
    snippets = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    program = tmp_path / "program.py"
    program.write_text("\n".join(snippets), "utf-8")
    run(*TORCHRUN, program, directory=tmp_path)
