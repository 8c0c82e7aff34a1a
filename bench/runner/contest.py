# SPDX-License-Identifier: MIT
"""Interleaved timing of contenders, each in its own process: A B C A B C ...

The load of a machine changes from minute to minute. Within a round it is nearly the same for all
contenders. The ratio of two contenders, computed round by round, is therefore stable even if their
times are not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from peers import PEERS, Tail, Work

from runner import Bench, Row, contestant
from runner.machine import SPARE_BYTES, memory_bytes
from runner.worker import PAUSE, Worker, WorkerError

# Seconds. The arrays of a step that takes longer are far larger than any cache, so warm-up steps
# after the turns of other contenders have no effect.
NO_WARMING = 0.25
# Limit on the seconds of all rounds of a case, and the least number of rounds despite it.
CASE_SECONDS, LEAST_ROUNDS = 40.0, 3


class Turn(NamedTuple):
    """What a contender does in its turn of each round."""

    worker: Worker
    steps: int
    warm: bool
    seconds: float  # estimate for the whole turn


class Contest:
    """Times contenders against one another. Keeps their processes from one case to the next."""

    def __init__(self) -> None:
        self._workers: dict[tuple[str, int], Worker] = {}
        # What was checked -> why it is wrong.
        self._wrong: dict[tuple[str, str, Tail | None], str] = {}

    def close(self) -> None:
        """End all processes, which frees their memory."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def row(
        self,
        bench: Bench,
        names: Sequence[str],
        sizes: Sequence[int],
        *,
        case: str = "",
        dtype: str = "float32",
        tail: bool = False,
        threads: int = 0,
        count_bytes: bool = False,
    ) -> Row:
        """Time contenders over tensors of these sizes, and return a row of the results."""
        work = Work(tuple(sizes), dtype, tail=Tail() if tail else None)
        case = case or f"{len(sizes):,} x {sizes[0]:,}"
        threads = threads or bench.threads
        not_run: dict[str, str] = {}
        held: dict[str, int] = {}
        try:
            entered = self._fitting(bench.chosen(tuple(names)), work, not_run)
            turns = calibrated(self._made(entered, work, threads, not_run), not_run)
            seconds = timed(turns, bench.rounds, not_run)
            if count_bytes:
                held = {n: turns[n].worker.call(contestant.held_bytes, n) for n in seconds}
        finally:
            for worker in self._workers.values():
                with contextlib.suppress(WorkerError):  # it has ended
                    worker.call(contestant.free)
        elements = round(sum(sizes) / len(sizes))  # the mean if sizes differ
        row = bench.row(case, elements, seconds, dtype=dtype, threads=threads, tensors=len(sizes))
        return {**row, "not_run": not_run, **({"held_bytes": held} if count_bytes else {})}

    def _fitting(self, names: Sequence[str], work: Work, not_run: dict[str, str]) -> list[str]:
        """Return the contenders that this work is for and that fit into memory together."""
        array = work.bytes_of_parameters
        # Only one contender steps at a time.
        temporaries = max((PEERS[name].temporaries for name in names), default=0)
        left = memory_bytes("MemAvailable") - SPARE_BYTES - temporaries * array
        holding: set[str] = set()  # contenders in one process share their arrays
        for name in names:
            peer = PEERS[name]
            # Parameters, gradients and two moments. A tail also has averages, and copies of the
            # gradients to set them from.
            needed = peer.held_bytes * sum(work.sizes) or (6 if work.tail else 4) * array
            wrong = self._wrong.get((name, work.dtype, work.tail))
            why = f"wrong result: {wrong}" if wrong else peer.limit(work)
            if not why and peer.module not in holding and needed > left:
                why = f"memory: needs {needed / 2**30:.1f} GiB beside the others"
            if why:
                not_run[name] = why
            elif peer.module not in holding:
                holding.add(peer.module)
                left -= needed
        return [name for name in names if name not in not_run]

    def _made(
        self, names: Sequence[str], work: Work, threads: int, not_run: dict[str, str]
    ) -> dict[str, Worker]:
        """Check new contenders, and set up the right ones, with all processes in parallel."""
        by_module: dict[str, list[str]] = {}
        for name in names:
            by_module.setdefault(PEERS[name].module, []).append(name)
        asked = {}
        for module, members in by_module.items():
            if (module, threads) not in self._workers or not self._workers[module, threads].alive:
                self._workers[module, threads] = Worker(threads)
            worker = asked[module] = self._workers[module, threads]
            new = [n for n in members if (n, work.dtype, work.tail) not in self._wrong]
            worker.send(contestant.prepare, members, new, work, threads)
        for module, worker in asked.items():
            with failing(by_module[module], not_run):
                for name, wrong in worker.receive().items():
                    self._wrong[name, work.dtype, work.tail] = wrong
                    if wrong:
                        not_run[name] = f"wrong result: {wrong}"
        return {name: asked[PEERS[name].module] for name in names if name not in not_run}


def calibrated(ready: dict[str, Worker], not_run: dict[str, str]) -> dict[str, Turn]:
    """Warm up each contender, and determine how many steps a timing needs."""
    turns = {}
    for name, worker in ready.items():
        with failing([name], not_run):
            time.sleep(PAUSE)
            seconds, steps = worker.call(contestant.calibrate, name)
            warm = seconds < NO_WARMING
            turns[name] = Turn(worker, steps, warm, 2 * PAUSE + seconds * (steps + warm))
    return turns


def timed(
    turns: dict[str, Turn], most_rounds: int, not_run: dict[str, str]
) -> dict[str, list[float]]:
    """Time the contenders, interleaved round by round."""
    one_round = max(PAUSE, sum(turn.seconds for turn in turns.values()))
    timings: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(min(most_rounds, max(LEAST_ROUNDS, int(CASE_SECONDS / one_round)))):
        for name in list(timings):
            turn = turns[name]
            time.sleep(PAUSE)
            measure = contestant.warm_seconds_of if turn.warm else contestant.seconds_of
            with failing([name], not_run):
                timings[name].append(turn.worker.call(measure, name, turn.steps))
            if name in not_run:
                del timings[name]
    return timings


@contextlib.contextmanager
def failing(names: Sequence[str], not_run: dict[str, str]) -> Iterator[None]:
    """Record an error of a worker as the reason why these contenders are not run."""
    try:
        yield
    except WorkerError as error:
        not_run |= dict.fromkeys(names, str(error))
