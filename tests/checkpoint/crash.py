# SPDX-License-Identifier: MIT
"""Processes that save and are killed at random instants. Needs its own interpreter (see below)."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
from fusedadam import Adam
from helpers import Array

# 3.3 MB per checkpoint, so that most of a save is spent on writing.
_SHAPES_AND_DTYPES = [
    *[((100, 1000), "float32")] * 2,
    ((100_000,), "float64"),
    ((17,), "float32"),
    ((), "float64"),
    ((0, 3), "float32"),
]


def parameters() -> list[Array]:
    return [np.ones(*of) for of in _SHAPES_AND_DTYPES]


def numbered(optimizer: Adam, number: int) -> None:
    """Set every element of the state, and the step count, to this value."""
    moments = [np.full_like(weight, number) for weight in optimizer.weights[1:]]
    optimizer.set_weights([number, *moments])


def number_of(path: Path) -> int:
    """Return the number of the state in a checkpoint. Fails if the file mixes several states."""
    loaded = Adam.load(path, parameters())
    count, *moments = loaded.weights
    assert len(moments) == 2 * len(_SHAPES_AND_DTYPES)
    for moment in moments:
        assert np.all(moment == count), f"{path} mixes {count} with {np.unique(moment)}"
    return int(count)


def forked(work: Callable[[], None]) -> int:
    """Fork a process that does this work and return its id. Only for single-threaded processes."""
    assert threading.active_count() == 1
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except Exception:  # noqa: BLE001 (reported to the parent)
        traceback.print_exc()
    finally:
        # The child must not do what is left for the parent, such as flush its buffered output.
        os._exit(status)


def _save_on_and_on(optimizer: Adam, path: Path, first: int) -> NoReturn:
    for number in itertools.count(first):
        numbered(optimizer, number)
        optimizer.save(path)
    raise AssertionError("itertools.count ended")


def kill_savers(path: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill processes at random instants while they save to `path`, and return what was seen.

    After each kill the file must load and hold a state that was saved, and no older one than
    before.
    """
    instants = random.Random(seed)
    optimizer = Adam()
    optimizer.build(parameters())
    durations = []
    for number in range(5):
        start = time.perf_counter()
        numbered(optimizer, number)
        optimizer.save(path)
        durations.append(time.perf_counter() - start)
    number = number_of(path)
    duration = sorted(durations)[2]

    unfinished = most_left = 0
    for _ in range(kills):
        first = number + 1
        child = forked(lambda first=first: _save_on_and_on(optimizer, path, first))  # type: ignore[misc]
        time.sleep(instants.uniform(0.0, 3.0 * duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"a save failed: status {status}"
        left = [file for file in path.parent.iterdir() if file != path]
        unfinished += bool(left)
        most_left = max(most_left, len(left))
        found = number_of(path)
        assert found >= number, f"number {found} is back, after {number}"
        number = found
    return {"unfinished": unfinished, "most_left": most_left, "last": number}


def save_at_once(path: Path, writers: int, saves: int) -> None:
    """Save to one path from several processes while loading from it. Nothing may fail."""
    optimizer = Adam()
    optimizer.build(parameters()[-3:])

    def write() -> None:
        for _ in range(saves):
            optimizer.save(path)

    optimizer.save(path)
    running = {forked(write) for _ in range(writers)}
    while running:
        Adam.load(path, parameters()[-3:])
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                running.remove(child)
