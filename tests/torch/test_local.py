# SPDX-License-Identifier: MIT
"""Shards: parts of tensors, and ZeRO, FSDP2 and distributed checkpoints in real processes.

The checks are in distributed_checks.py. This file starts the processes once for all checks and
reports the outcome of each check separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import Array, assert_same_bits, running

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import AdamW, fused_step
from torch_helpers import array, drawn, everything, tensor

# torch deprecates what its own functional optimizers use. ZeRO imports them.
TORCHS_OWN = "`torch.jit."
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", TORCHS_OWN, DeprecationWarning)
    import distributed_worker
    from distributed_checks import CHECKS
    from distributed_worker import RANKS, TIME_LIMIT_S

# The shape of a tensor, and the offset and shape of its part in one process.
PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((90, 70), (31, 0), (40, 70)),
    "one column": ((90, 70), (0, 69), (90, 1)),
    "block": ((90, 70), (5, 13), (37, 29)),
    "some of a vector": ((5000,), (1237,), (2500,)),
    "last of three": ((7, 50, 33), (2, 0, 5), (4, 50, 13)),
    "many columns": ((700, 200), (0, 100), (700, 100)),
}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {}),
    "float16": ("float16", {"moments": "float32"}),
    "float32, packed": ("float32", {"moments": "packed"}),
    "int16": ("bfloat16", {"moments": "bfloat16", "low_bits": "int16"}),
    "packed + int8": ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
}


@pytest.mark.parametrize(("dtype", "formats"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("whole", "offset", "shape"), PARTS.values(), ids=PARTS)
def test_parts_have_the_bits_of_the_whole(
    whole: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: str,
    formats: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    start, *grads = (array(drawn(rng, whole, dtype)) for _ in range(3))
    part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))

    def stepped(of: Callable[[Array], Array], threads: int) -> dict[str, Array]:
        p = torch.nn.Parameter(tensor(of(start)))
        optimizer = AdamW([p], lr=0.01, seed=3, **formats)
        with running(threads=threads):
            for grad in grads:
                p.grad = tensor(of(grad))
                optimizer.step()
        return everything(optimizer)[0]

    expected = stepped(lambda x: x, 1)
    monkeypatch.setattr(fused_step, "any_distributed", lambda _: True)
    monkeypatch.setattr(fused_step, "part_of", lambda _: (whole, offset))
    for threads in (1, 3):
        actual = stepped(lambda x: np.ascontiguousarray(x[part]), threads)
        for name, x in actual.items():
            assert_same_bits(x, expected[name][part] if x.ndim else expected[name], name)


# -- processes --------------------------------------------------------------------------------


class Rank(NamedTuple):
    """What a process left: the outcomes of its checks, and its stderr."""

    outcomes: dict[str, str | None]
    status: int
    errors: str


def start(rank: int, directory: Path) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAM_", "OMP_"))}
    filters = ["-W", "error", "-W", f"ignore:{TORCHS_OWN}:DeprecationWarning"]
    command = [sys.executable, *filters, distributed_worker.__file__, str(rank), str(directory)]
    with (directory / f"errors-{rank}.txt").open("wb") as errors:
        return subprocess.Popen(command, env=kept | {"OMP_NUM_THREADS": "1"}, stderr=errors)


def left_by(rank: int, process: subprocess.Popen[bytes], directory: Path) -> Rank:
    # A rank that hangs exits by itself and prints its stack.
    status = process.wait(TIME_LIMIT_S + 30)
    outcomes = directory / f"outcomes-{rank}.json"
    return Rank(
        json.loads(outcomes.read_text("utf-8")) if outcomes.exists() else {},
        status,
        (directory / f"errors-{rank}.txt").read_text("utf-8"),
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    directory = tmp_path_factory.mktemp("ranks")
    processes = [start(rank, directory) for rank in range(RANKS)]
    try:
        yield [left_by(rank, process, directory) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(name: str, ranks: list[Rank]) -> None:
    problems = []
    for number, rank in enumerate(ranks):
        if name not in rank.outcomes:
            problems.append(f"rank {number} did not get to it:\n{rank.errors}")
        elif rank.outcomes[name] is not None:
            problems.append(f"rank {number}:\n{rank.outcomes[name]}")
    assert not problems, "\n".join(problems)


def test_processes_end_well(ranks: list[Rank]) -> None:
    assert [(rank.status, rank.errors) for rank in ranks] == [(0, "")] * RANKS
