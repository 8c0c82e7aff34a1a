# SPDX-License-Identifier: MIT
"""Ctrl-C at random instants of long calls, sent to a process group as a terminal does.

Needs its own interpreter. Another process of the group sends the signals.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from calls import CALLS, Call, Scene
from training import ShapesAndDtypes

_SENDER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    time.sleep(float(line))
    os.killpg(0, signal.SIGINT)
"""


@contextlib.contextmanager
def _sender() -> Iterator[Any]:
    assert os.getpgrp() == os.getpid(), "the tests are of this group, too"
    process = subprocess.Popen(
        [sys.executable, "-c", _SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.stdin
        process.stdin.close()


LARGE: ShapesAndDtypes = [((4000, 1000), "float32")]
SMALLER: ShapesAndDtypes = [((1000, 1000), "float32")]
KINDS: dict[str, tuple[Call, ShapesAndDtypes]] = {
    "large": (CALLS["step"], LARGE),
    "many": (CALLS["step"], [((2, 1000), "float32")] * 300),
    "loss": (CALLS["get_updates with a loss"], SMALLER),
    "sparse": (CALLS["apply_sparse"], SMALLER),
    "stateless": (CALLS["stateless"], LARGE),
    "files": (CALLS["save"], SMALLER),
}


def interrupt(name: str, interrupts: int) -> dict[str, int]:
    """Interrupt until this many interrupts have hit a call, and return what was seen.

    The call must have taken effect as a whole or not at all, and must work the next time.
    """
    kind = KINDS[name]
    untouched, done = Scene(*kind), Scene(*kind)
    before = untouched.observe()
    done.call()
    after = done.observe()
    assert before != after
    instants = random.Random(5)
    seen = {"interrupts": 0, "within a call": 0, "call completed": 0}
    with _sender() as sender:
        latency = sorted(_latency(sender) for _ in range(5))[2]
        duration = 0.05
        while seen["within a call"] < interrupts:
            # On a busy machine, a signal may take longer than a call.
            assert seen["interrupts"] < 50 * interrupts, seen
            scene = Scene(*kind)
            delay = max(0.0, instants.uniform(0, duration) - latency)
            took = _interrupted(scene.call, sender, delay)
            found = scene.observe()
            assert found in (before, after), "neither before the call nor after it"
            assert took is None or found == after
            duration = duration if took is None else took
            seen["interrupts"] += 1
            seen["within a call"] += took is None
            seen["call completed"] += took is None and found == after
            # Nothing is left locked or half counted.
            if found == before:
                scene.call()
                assert scene.observe() == after
    return seen


def _latency(sender: Any) -> float:
    """How long a signal takes that is sent immediately."""
    begin = time.perf_counter()
    _interrupted(_wait, sender, 0)
    return time.perf_counter() - begin


def _wait() -> None:
    """Sleep until an interrupt arrives, at most 5 s: Python drops one raised in a finalizer.

    Many short sleeps, because a signal just before a sleep is only noticed after it.
    """
    for _ in range(500):
        time.sleep(0.01)


def _interrupted(call: Callable[[], object], sender: Any, delay: float) -> float | None:
    """Call and interrupt after `delay` seconds. Return the duration if the call ended first."""
    duration = None
    try:
        sender.write(f"{delay}\n")
        sender.flush()
        begin = time.perf_counter()
        call()
        duration = time.perf_counter() - begin
        _wait()
    except KeyboardInterrupt:
        pass
    return duration
