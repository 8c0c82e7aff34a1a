# SPDX-License-Identifier: MIT
"""Signals at random instants of long calls, with the handler of Ctrl-C. Needs its own interpreter.

A timer's signal interrupts compiled code as that of a terminal does, at the time that was asked for.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from calls import CALLS, Call, Scene
from training import ShapesAndDtypes

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
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    duration = 0.05
    while seen["within a call"] < interrupts:
        assert seen["interrupts"] < 50 * interrupts, seen
        scene = Scene(*kind)
        took = _interrupted(scene.call, instants.uniform(1e-6, duration))
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


def _interrupted(call: Callable[[], object], delay: float) -> float | None:
    """Call and interrupt after `delay` seconds. Return the duration if the call ended first."""
    duration = None
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        begin = time.perf_counter()
        call()
        duration = time.perf_counter() - begin
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Python can overlook a signal that another thread has received until it next takes the GIL.
        time.sleep(0)
    except KeyboardInterrupt:
        pass
    return duration
