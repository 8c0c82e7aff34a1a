# SPDX-License-Identifier: MIT
"""Threads of Python: work that starts at the same moment, and whether the GIL is free."""

from __future__ import annotations

import concurrent.futures
import contextlib
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work(0)` ... `work(count - 1)`, all started at the same moment."""
    barrier = threading.Barrier(count)

    def run(i: int) -> Any:
        barrier.wait()
        return work(i)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class Ticks:
    """The times at which another thread ran, every 0.2 ms while the GIL is free."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Ticks]:
        ticks, stop = cls(), threading.Event()

        def tick() -> None:
            while not stop.wait(0.0002):
                ticks.times.append(time.perf_counter())

        interval = sys.getswitchinterval()
        # Without GIL requests by other threads, this thread keeps the GIL between bytecodes.
        sys.setswitchinterval(1000.0)
        thread = threading.Thread(target=tick)
        thread.start()
        try:
            yield ticks
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)

    def assert_run_during(self, call: Callable[[], object]) -> None:
        """Require that a call of some 5 ms leaves the GIL free for most of the time."""
        call()  # the first may do other work
        for _ in range(100):
            begin, known = time.perf_counter(), len(self.times)
            call()
            end = time.perf_counter()
            times = [begin, *self.times[known:], end]
            if 4 * max(map(operator.sub, times[1:], times)) < end - begin:
                return
        raise AssertionError("no other thread ran during 100 long calls")
