# SPDX-License-Identifier: MIT
"""Interleaved timing of contenders, each in its own process: A B C A B C ...

The load of a machine changes from minute to minute. Within a round it is nearly the same for all
contenders. The ratio of two contenders, computed round by round, is therefore stable even if their
times are not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lines import PAUSE, WorkerError
from machine import available_bytes
from peers import (
    ADAPTERS,
    FORMAT_PEERS,
    HELD_BYTES,
    MODULES,
    TAIL_PEERS,
    TEMPORARIES,
    Work,
    load,
)
from processes import Worker

if TYPE_CHECKING:
    from types import TracebackType

    from settings import Settings
    from typing_extensions import Self

ALWAYS = ("fusedadam", "traffic twin", *ADAPTERS, *FORMAT_PEERS)
# Seconds. The arrays of a step that takes longer are far larger than any cache, so warm-up steps
# after the turns of other contenders have no effect.
NO_WARMING = 0.25
# Limit on the seconds of all rounds of a case, and the least number of rounds despite it.
CASE_SECONDS, LEAST_ROUNDS = 40.0, 3
# Memory left to other programs.
SPARE_BYTES = 1 << 30

_chosen: frozenset[str] | None = None


def choose(names: Iterable[str] | None) -> None:
    """Limit this run to these contenders, beside fusedadam and its twin. None means all."""
    global _chosen
    _chosen = None if names is None else frozenset(names).union(ALWAYS)


def chosen(names: Iterable[str]) -> list[str]:
    """Return the contenders that take part in this run."""
    return [name for name in names if _chosen is None or name in _chosen]


class Case(NamedTuple):
    """The tensors of a row of the results: all of one size, or those of a model."""

    name: str
    tensors: int
    elements: int  # of one tensor; the rounded mean if sizes differ
    differing: tuple[int, ...] = ()  # the elements of each tensor if sizes differ

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each tensor."""
        return self.differing or (self.elements,) * self.tensors


class Turn(NamedTuple):
    """What a contender does in its turn of each round."""

    worker: Worker
    steps: int
    warm: bool
    seconds: float  # estimate for the whole turn


class Contest:
    """Times contenders against one another. As a context manager, it ends their processes."""

    def __init__(
        self,
        names: Iterable[str],
        settings: Settings,
        *,
        threads: int | None = None,
        dtype: str = "float32",
        tail: bool = False,
        count_bytes: bool = False,
    ) -> None:
        self._settings = settings
        self._threads = settings.threads if threads is None else threads
        self._dtype = dtype
        self._tail = tail
        self._count_bytes = count_bytes
        self._modules = TAIL_PEERS if tail else MODULES
        self._names = chosen(names)
        self._workers: dict[str, Worker] = {}
        self._checked: set[str] = set()
        self._excluded: dict[str, str] = {}  # from all further cases -> the reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers.values():
            worker.close()

    def row(self, case: Case, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Time a case and return a row of the results. `names` selects contenders."""
        entered = [name for name in self._names if names is None or name in names]
        not_run = self._not_fit(case, entered)
        ready = self._made(case, [name for name in entered if name not in not_run], not_run)
        try:
            turns = self._calibrated(ready, not_run)
            seconds = self._timed(turns, not_run)
            held = self._held(turns) if self._count_bytes else {}
        finally:
            self._freed()
        return {
            "case": case.name,
            "dtype": self._dtype,
            "threads": self._threads,
            "tensors": case.tensors,
            "elements": case.elements,
            "seconds": seconds,
            "steps": {name: turns[name].steps for name in seconds},
            "not_run": not_run,
        } | held

    def _not_fit(self, case: Case, names: Sequence[str]) -> dict[str, str]:
        """Return the contenders that cannot run, with reasons known before they are started."""
        work = Work(case.sizes, self._dtype)
        reasons = {}
        array = np.dtype(self._dtype).itemsize * sum(case.sizes)
        # Only one contender steps at a time.
        temporaries = max((TEMPORARIES.get(name, 0) for name in names), default=0)
        left = available_bytes() - SPARE_BYTES - temporaries * array
        # Parameters, gradients and two moments. A tail also has averages, and copies of the
        # gradients to set them from.
        usual = (6 if self._tail else 4) * array
        holding: set[str] = set()  # contenders in one process share their arrays
        for name in names:
            module = self._modules[name]
            why = self._excluded.get(name) or load(module).limit(name, work)
            needed = HELD_BYTES[module] * sum(case.sizes) if module in HELD_BYTES else usual
            if not why and module not in holding and needed > left:
                why = f"memory: needs {needed / 2**30:.1f} GiB beside the others"
            if why:
                reasons[name] = why
            elif module not in holding:
                holding.add(module)
                left -= needed
        return reasons

    def _made(self, case: Case, names: Sequence[str], not_run: dict[str, str]) -> dict[str, Worker]:
        """Check new contenders, and set up all for the case, with all processes in parallel."""
        self._started(names)
        by_module: dict[str, list[str]] = {}
        for name in names:
            if name not in self._excluded and self._right(name):
                by_module.setdefault(self._modules[name], []).append(name)
            else:
                not_run[name] = self._excluded[name]
        work = [case.tensors, case.elements, self._dtype, self._tail, case.differing]
        asked = []
        ready: dict[str, Worker] = {}
        for module, members in by_module.items():
            with failing(members, not_run):
                self._workers[module].send("make", names=members, work=work)
                asked.append(module)
        for module in asked:
            with failing(by_module[module], not_run):
                self._workers[module].receive()
                ready |= dict.fromkeys(by_module[module], self._workers[module])
        return {name: ready[name] for name in names if name in ready}

    def _started(self, names: Sequence[str]) -> None:
        """Start all processes that are not running, in parallel."""
        new: dict[str, Worker] = {}
        for module in dict.fromkeys(self._modules[name] for name in names):
            if module not in self._workers or not self._workers[module].alive:
                new[module] = self._workers[module] = Worker(module, self._threads)
        for module, worker in new.items():
            members = [name for name in self._names if self._modules[name] == module]
            with failing(members, self._excluded):
                worker.receive()

    def _right(self, name: str) -> bool:
        """Whether a contender's results are correct. If not, it is excluded from timing."""
        if name not in self._checked:
            self._checked.add(name)
            with failing([name], self._excluded):
                worker = self._workers[self._modules[name]]
                wrong = worker.ask("error", name=name, dtype=self._dtype, tail=self._tail)
                if wrong:
                    self._excluded[name] = f"wrong result: {wrong}"
        return name not in self._excluded

    def _calibrated(self, ready: dict[str, Worker], not_run: dict[str, str]) -> dict[str, Turn]:
        """Warm up each contender, and determine how many steps a timing needs."""
        turns = {}
        for name, worker in ready.items():
            with failing([name], not_run):
                time.sleep(PAUSE)
                seconds, steps = worker.ask("calibrate", name=name)
                warm = seconds < NO_WARMING
                turns[name] = Turn(worker, steps, warm, 2 * PAUSE + seconds * (steps + warm))
        return turns

    def _timed(self, turns: dict[str, Turn], not_run: dict[str, str]) -> dict[str, list[float]]:
        """Time the contenders, interleaved round by round."""
        timings: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(self._rounds(sum(turn.seconds for turn in turns.values()))):
            for name in list(timings):
                with failing([name], not_run):
                    worker, steps, warm, _ = turns[name]
                    time.sleep(PAUSE)
                    timings[name].append(worker.ask("time", name=name, steps=steps, warm=warm))
                if name in not_run:
                    del timings[name]
        return timings

    def _held(self, turns: dict[str, Turn]) -> dict[str, dict[str, int]]:
        """Return the bytes that each contender holds, under the name of this entry of a row."""
        return {
            "held_bytes": {
                name: turn.worker.ask("held_bytes", name=name) for name, turn in turns.items()
            }
        }

    def _rounds(self, seconds: float) -> int:
        """Return the number of rounds if each takes `seconds`."""
        most = int(CASE_SECONDS / max(seconds, PAUSE))
        return min(self._settings.rounds, max(LEAST_ROUNDS, most))

    def _freed(self) -> None:
        for worker in self._workers.values():
            if worker.alive:
                with contextlib.suppress(WorkerError):
                    worker.ask("free")


@contextlib.contextmanager
def failing(names: Iterable[str], reasons: dict[str, str]) -> Iterator[None]:
    """Record an error of a worker as the reason why these contenders are not run."""
    try:
        yield
    except WorkerError as error:
        reasons |= dict.fromkeys(names, str(error))
