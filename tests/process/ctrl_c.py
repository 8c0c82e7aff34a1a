# SPDX-License-Identifier: MIT
"""Ctrl-C at random instants of long calls, sent to a process group as a terminal does.

Needs its own interpreter. Another process of the group sends the signals.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import autograd.numpy as anp
import numpy as np
import oracle
from fusedadam import Adam, adam_step
from helpers import Array, values

_SENDER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    time.sleep(float(line))
    os.killpg(0, signal.SIGINT)
"""

_ROW = 1000


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


class Kind(ABC):
    """A kind of long call, with an oracle of its effect."""

    @abstractmethod
    def begin(self) -> None:
        """Start over. Calls are interrupted in pairs, first and second."""

    @abstractmethod
    def prepare(self) -> Callable[[], object]:
        """Return the next call, which stays the same until it has taken effect."""

    @abstractmethod
    def has_happened(self) -> bool:
        """Whether the call has taken full effect. Fails if it has taken effect in part."""


class Steps(Kind):
    """Steps of tables with equal rows, so that the oracle needs only one row of each."""

    def __init__(self, rows: Sequence[int], seed: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows = rows

    def table(self, rows: int) -> Array:
        return np.tile(values(self.rng, _ROW, "float32"), (rows, 1))

    def begin(self) -> None:
        self.params = [self.table(rows) for rows in self.rows]
        self.grads = [self.table(rows) for rows in self.rows]
        self.optimizer = Adam(lr=0.1)
        self.reference = oracle.OracleAdam([p[0] for p in self.params], lr=0.1)

    def gradients(self) -> list[Array]:
        """The oracle's gradients."""
        return [g[0] for g in self.grads]

    def prepare(self) -> Callable[[], object]:
        return lambda: self.optimizer.apply_gradients(
            list(zip(self.grads, self.params, strict=True))
        )

    def state(self) -> tuple[int, Sequence[Array], Sequence[Array]]:
        return self.optimizer.iterations, self.params, self.optimizer.weights[1:]

    def is_at(self, reference: oracle.OracleAdam) -> bool:
        iterations, params, moments = self.state()
        expected = [*reference.m, *reference.v]
        assert len(moments) in (0, len(expected))
        return iterations == reference.iterations and all(
            bool(np.all(a.view(np.uint32) == e.view(np.uint32)))
            for a, e in zip(
                [*params, *moments],
                [*reference.params, *expected][: len(params) + len(moments)],
                strict=True,
            )
        )

    def has_happened(self) -> bool:
        after = copy.deepcopy(self.reference)
        after.step(self.gradients())
        if self.is_at(after):
            self.reference = after
            return True
        assert self.is_at(self.reference), "neither before the step nor after it"
        return False


class Loss(Steps):
    """Steps with a loss that autograd differentiates."""

    def prepare(self) -> Callable[[], object]:
        return lambda: self.optimizer.get_updates(lambda p: anp.sum(p[0] * p[0]), self.params)

    def gradients(self) -> list[Array]:
        (p,) = self.reference.params
        return [np.float32(2) * p]


class Sparse(Steps):
    """Steps of all rows of a table, each of which is named twice."""

    def prepare(self) -> Callable[[], object]:
        indices = np.tile(np.arange(self.rows[0]), 2)
        rows = np.concatenate([self.grads[0]] * 2)
        return lambda: self.optimizer.apply_sparse(indices, rows, self.params[0])

    def gradients(self) -> list[Array]:
        return [g[0] + g[0] for g in self.grads]


class Stateless(Steps):
    """Steps with the caller's own moments."""

    def begin(self) -> None:
        super().begin()
        (p,) = self.params
        self.moments = [np.zeros_like(p), np.zeros_like(p)]

    def prepare(self) -> Callable[[], object]:
        step = self.reference.iterations + 1
        return lambda: adam_step(self.params[0], self.grads[0], *self.moments, step=step, lr=0.1)

    def state(self) -> tuple[int, Sequence[Array], Sequence[Array]]:
        # There is no count that could be wrong.
        steps = self.reference.iterations + (not np.array_equal(self.params[0], self._before()))
        return steps, self.params, self.moments

    def _before(self) -> Array:
        return np.broadcast_to(self.reference.params[0], self.params[0].shape)

    def is_at(self, reference: oracle.OracleAdam) -> bool:
        _, params, moments = self.state()
        return all(
            bool(np.all(a.view(np.uint32) == e.view(np.uint32)))
            for a, e in zip(
                [*params, *moments], [*reference.params, *reference.m, *reference.v], strict=True
            )
        )


class Files(Steps):
    """A state that is saved and loaded."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(rows)
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "state"

    def begin(self) -> None:
        super().begin()
        super().prepare()()
        self.optimizer.save(self.path)
        super().prepare()()

    def prepare(self) -> Callable[[], object]:
        def save_and_load() -> None:
            self.optimizer.save(self.path)
            Adam.load(self.path, self.params)

        return save_and_load

    def has_happened(self) -> bool:
        loaded = Adam.load(self.path, self.params)
        assert loaded.iterations in (1, 2)
        if loaded.iterations == 2:
            for a, e in zip(loaded.weights, self.optimizer.weights, strict=True):
                assert np.array_equal(a, e)
        self.optimizer.save(self.path)
        assert list(self.directory.iterdir()) == [self.path]
        return loaded.iterations == 2


_KINDS: dict[str, Callable[[], Kind]] = {
    "large": lambda: Steps([8000]),
    "many": lambda: Steps([2] * 300),
    "loss": lambda: Loss([2000]),
    "sparse": lambda: Sparse([2000]),
    "stateless": lambda: Stateless([8000]),
    "files": lambda: Files([2000]),
}


def interrupt(kind: str, interrupts: int) -> dict[str, int]:
    """Interrupt calls of this kind and return what was seen."""
    return interrupt_calls(_KINDS[kind](), interrupts)


def interrupt_calls(kind: Kind, interrupts: int) -> dict[str, int]:
    """Interrupt until this many interrupts have hit a call, and return what was seen."""
    instants = random.Random(5)
    seen = {"interrupts": 0, "within a call": 0, "call completed": 0}
    with _sender() as sender:
        latency = sorted(_latency(sender) for _ in range(5))[2]
        durations = [0.05, 0.05]
        while seen["within a call"] < interrupts:
            # On a busy machine, a signal may take longer than a call.
            assert seen["interrupts"] < 50 * interrupts, seen
            kind.begin()
            for i in range(2):
                delay = max(0.0, instants.uniform(0, durations[i]) - latency)
                duration = _interrupted(kind.prepare(), sender, delay)
                happened = kind.has_happened()
                assert happened or duration is None
                if duration is not None:
                    durations[i] = duration
                seen["interrupts"] += 1
                seen["within a call"] += duration is None
                seen["call completed"] += happened and duration is None
        # Nothing is left locked or half counted.
        kind.prepare()()
        assert kind.has_happened()
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
