# SPDX-License-Identifier: MIT
"""The worker process of one peer. It reads commands and writes answers as lines of JSON.

Each peer has its own process, so that peers do not share threads, an OpenMP runtime, a Keras
backend or memory. `processes.py` starts this file with three arguments: the peer's module, the
number of threads and the CPUs to run on. The environment sets every library's number of threads.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers import Array, Contender, Work

# Least seconds of a timing, so that the overhead of the clock and the loop is negligible.
SHORTEST_TIMING = 0.010
MOST_STEPS = 10_000
# Seconds of warm-up steps before a timing, so that sleeping threads wake up and spread over cores.
WARMING = 0.020
# Seconds. A step that takes longer needs no second warm-up step.
LONG_STEP = 0.25
LATER_STEPS = 5


def main() -> int:
    """Answer commands until the end of standard input."""
    module, threads, cpus = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    # This must precede the start of any thread. Without this call, only the environment limits
    # threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    answers = private_stdout()

    def answer(act: Callable[[], Any]) -> None:
        try:
            reply = {"result": act()}
        except Exception as error:  # noqa: BLE001 - the report shows whatever a peer raises
            reply = {"error": f"{type(error).__name__}: {error}".split("\n", 1)[0]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    worker = Worker(module, threads)
    answer(worker.versions)
    for line in sys.stdin:
        command = json.loads(line)
        act = getattr(worker, command.pop("command"))
        answer(functools.partial(act, **command))
    return 0


def private_stdout() -> Any:
    """Return the standard output for answers, and redirect what peers print to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class Worker:
    """The commands: each public method is one."""

    def __init__(self, module: str, threads: int) -> None:
        self._module = module
        self._threads = threads
        self._contenders: dict[str, Contender] = {}
        self._grads: list[Array] = []

    @functools.cached_property
    def _peer(self) -> Any:
        from peers import load

        return load(self._module)

    def versions(self) -> dict[str, str]:
        """Import the peer, and return the versions of the packages it needs."""
        versions: dict[str, str] = self._peer.versions()
        return versions

    def error(self, name: str, dtype: str, tail: bool) -> str:
        """Return how a contender's results are wrong, or ""."""
        from peers import reference

        return reference.error(self._peer, name, work_of(1, 1, dtype, tail), self._threads)

    def make(self, names: list[str], work: list[Any]) -> None:
        """Set up contenders."""
        described = work_of(*work)
        self._contenders = self._peer.make(names, described, self._threads)
        # A tail zeroes the gradients, so they are set again before each step.
        self._grads = list(described.grads()) if described.tail else []

    def free(self) -> None:
        """Drop all contenders and their memory."""
        self._contenders = {}
        self._grads = []
        collect()

    def calibrate(self, name: str) -> tuple[float, int]:
        """Warm up. Return the seconds per step, and how many steps a timing needs."""
        self._seconds(name, 1)  # the first step may compile
        seconds = self._seconds(name, 1)
        if seconds < LONG_STEP:
            seconds = self._seconds(name, 1)
        steps = 1
        while seconds * steps < SHORTEST_TIMING / 2 and steps < MOST_STEPS:
            steps = min(MOST_STEPS, max(2 * steps, int(SHORTEST_TIMING / 2 / seconds)))
            seconds = self._seconds(name, steps)
        return seconds, min(MOST_STEPS, max(1, round(SHORTEST_TIMING / seconds + 0.5)))

    def time(self, name: str, steps: int, warm: bool) -> float:
        """Return the mean seconds of `steps` steps. With `warm`, untimed warm-up steps precede."""
        begin = time.perf_counter()
        while warm and time.perf_counter() - begin < WARMING:
            self._set_grads(name)
            self._contenders[name].step()
        return self._seconds(name, steps)

    def held_bytes(self, name: str) -> int:
        """Return the bytes of a contender's parameters, gradients and state."""
        return self._contenders[name].held_bytes()

    def _require_right(self, name: str) -> None:
        """Check a contender. This also loads and compiles everything its steps need."""
        wrong = self.error(name, "float32", False)
        if wrong:
            raise ArithmeticError(f"wrong result: {wrong}")

    def _set_grads(self, name: str) -> None:
        if self._grads:
            self._contenders[name].set_grads(self._grads)

    def _seconds(self, name: str, steps: int) -> float:
        step = self._contenders[name].step
        if not self._grads:
            return seconds_of(step, steps) / steps
        total = 0.0
        for _ in range(steps):
            self._set_grads(name)
            total += seconds_of(step, 1)
        return total / steps

    def first_steps(self, work: list[Any], times: int) -> list[list[float]]:
        """Make `times` optimizers, one after the other, and time the first steps of each."""
        begin = self._peer.beginning(work_of(*work), self._threads)
        return [first_steps(begin) for _ in range(times)]

    def memory(self, name: str, work: list[Any]) -> tuple[int, int]:
        """Return the resident bytes with all libraries loaded, and the peak over three steps."""
        self._require_right(name)
        collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        baseline = process_bytes("VmRSS")
        self.make([name], work)
        for _ in range(3):
            self._contenders[name].step()
        return baseline, process_bytes("VmHWM")


def work_of(
    tensors: int, elements: int, dtype: str, tail: bool, differing: Sequence[int] = ()
) -> Work:
    """Return the work of a command. `differing` has the size of each tensor if sizes differ."""
    from peers import Tail, Work

    sizes = tuple(differing) or (elements,) * tensors
    return Work(sizes, dtype, tail=Tail() if tail else None)


def seconds_of(step: Callable[[], object], steps: int) -> float:
    """Return the total seconds of `steps` steps."""
    repeats: Iterable[int] = range(steps)
    begin = time.perf_counter()
    for _ in repeats:
        step()
    return time.perf_counter() - begin


def first_steps(begin: Callable[[], Callable[[], object]]) -> list[float]:
    """Return the seconds of making an optimizer, of its first step and the median of later ones."""
    start = time.perf_counter()
    step = begin()
    made = time.perf_counter()
    step()
    stepped = time.perf_counter()
    later = sorted(seconds_of(step, 1) for _ in range(LATER_STEPS))
    del step
    collect()
    return [made - start, stepped - made, later[LATER_STEPS // 2]]


def process_bytes(field: str) -> int:
    """Return a memory size of this process from /proc, which only Linux has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {field} in /proc/self/status")


def collect() -> None:
    """Collect reference cycles, and return free heap memory to the system."""
    import ctypes
    import gc

    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())
