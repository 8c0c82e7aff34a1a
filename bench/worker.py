# SPDX-License-Identifier: MIT
"""A process that holds one peer: it obeys the benchmark, a line of JSON at a time.

A peer has a process to itself, so that its threads, its copy of OpenMP, its backend of Keras and its
memory are its own. `rounds.py` starts this file with the peer's module, the number of threads and
the CPUs to run on, and with every library's number of threads in the environment.
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

# A timing takes so long at least, in seconds: then neither the clock nor the loop shows.
SHORTEST_TIMING = 0.010
MOST_STEPS = 10_000
# Steps for so many seconds go before: threads that slept come back, each on a core of its own.
WARMING = 0.020
# A step of so many seconds needs no second one to be warm.
LONG_STEP = 0.25
LATER_STEPS = 5


def main() -> int:
    """Answer until the commands end."""
    module, threads, cpus = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    # Before anything starts a thread. Where there is no such call, the environment alone counts.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    answers = private_stdout()

    def answer(act: Callable[[], Any]) -> None:
        try:
            reply = {"result": act()}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is for the report
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
    """Return what was the standard output, and let what peers print go to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


class Worker:
    """The commands."""

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
        """Import the peer, and return the versions of what it needs."""
        versions: dict[str, str] = self._peer.versions()
        return versions

    def error(self, name: str, dtype: str, tail: bool) -> str:
        """Return what is wrong with a contender's results, or ""."""
        from peers import reference

        return reference.error(self._peer, name, work_of(1, 1, dtype, tail), self._threads)

    def make(self, names: list[str], work: list[Any]) -> None:
        """Set up contenders."""
        described = work_of(*work)
        self._contenders = self._peer.make(names, described, self._threads)
        # A tail zeroes its gradients: they are set again before each step.
        self._grads = list(described.grads()) if described.tail else []

    def free(self) -> None:
        """Drop all contenders and their memory."""
        self._contenders = {}
        self._grads = []
        collect()

    def calibrate(self, name: str) -> tuple[float, int]:
        """Warm up; return the seconds of a step, and how many steps a timing needs."""
        self._seconds(name, 1)  # compilers run in the first
        seconds = self._seconds(name, 1)
        if seconds < LONG_STEP:
            seconds = self._seconds(name, 1)
        steps = 1
        while seconds * steps < SHORTEST_TIMING / 2 and steps < MOST_STEPS:
            steps = min(MOST_STEPS, max(2 * steps, int(SHORTEST_TIMING / 2 / seconds)))
            seconds = self._seconds(name, steps)
        return seconds, min(MOST_STEPS, max(1, round(SHORTEST_TIMING / seconds + 0.5)))

    def time(self, name: str, steps: int, warm: bool) -> float:
        """Return the seconds of a step, the mean of `steps`; after some that are not timed."""
        begin = time.perf_counter()
        while warm and time.perf_counter() - begin < WARMING:
            self._set_grads(name)
            self._contenders[name].step()
        return self._seconds(name, steps)

    def _require_right(self, name: str) -> None:
        """Check a contender, which also loads and compiles all that its steps need."""
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
        """Return seconds of making an optimizer, its first step and a later one, so many times."""
        begin = self._peer.beginning(work_of(*work), self._threads)
        return [first_steps(begin) for _ in range(times)]

    def memory(self, name: str, work: list[Any]) -> tuple[int, int]:
        """Return the bytes in memory with everything loaded, and at most over three steps."""
        self._require_right(name)
        collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        baseline = process_bytes("VmRSS")
        self.make([name], work)
        for _ in range(3):
            self._contenders[name].step()
        return baseline, process_bytes("VmHWM")


def work_of(
    tensors: int, elements: int, dtype: str, tail: bool, differing: Sequence[int] = ()
) -> Work:
    """Return what a command describes; `differing`: the size of each tensor, where they differ."""
    from peers import Tail, Work

    sizes = tuple(differing) or (elements,) * tensors
    return Work(sizes, dtype, tail=Tail() if tail else None)


def seconds_of(step: Callable[[], object], steps: int) -> float:
    """Return the seconds of so many steps."""
    repeats: Iterable[int] = range(steps)
    begin = time.perf_counter()
    for _ in repeats:
        step()
    return time.perf_counter() - begin


def first_steps(begin: Callable[[], Callable[[], object]]) -> list[float]:
    """Return the seconds of making an optimizer, of its first step and of a later one."""
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
    """Return a count of this process' memory, which Linux alone has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no {field} in /proc/self/status")


def collect() -> None:
    """Free what is held by cycles, and give small blocks back to the system."""
    import ctypes
    import gc

    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())
