# SPDX-License-Identifier: MIT
"""Steps in a process with another library's OpenMP runtime: torch's or scikit-learn's.

The wheels of these libraries and of fusedadam each contain a copy of libgomp, and the copies do not
know of each other's threads. The other library is imported before or after fusedadam. It works on
all threads (a matrix product, a k-means), and then steps are timed twice: "right after", while its
threads still spin-wait on their CPUs, for about 9 ms, and "later", when they sleep. The baseline is
a process without another runtime, where the caller computes on one thread instead.

The processes of all kinds are interleaved. The section `neighbours` measures the contention of
interleaved steps and products.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import child
import numpy as np
from processes import THREAD_VARIABLES
from settings import Results, Settings, Tick

from sections.neighbours import Seconds, joined, make_step, mean_of, torch_product, turns

TITLE = "Beside another OpenMP runtime"

ALONE = "alone"
RIGHT_AFTER, LATER = "right after", "later"
WHENS = (RIGHT_AFTER, LATER)

SIZES = (1 << 15, 1 << 20, 1 << 24)
QUICK_SIZES = (1 << 15,)
# Seconds of steps "right after", less than the other threads spin. At least one step is timed.
SPIN_S = 0.005
SLEEP_S = 0.02  # seconds after which the other threads sleep
STEPS_S = 0.02  # seconds of steps "later"
MOST_STEPS = 500
SAMPLES = 4_000  # of the k-means, which divides them among threads in chunks of 256


class Process(NamedTuple):
    """The libraries that a process imports before and after fusedadam."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All libraries."""
        return self.before + self.after


PROCESSES = {
    ALONE: Process(),
    "torch before": Process(before=("torch",)),
    "torch after": Process(after=("torch",)),
    "scikit-learn before": Process(before=("sklearn",)),
    "scikit-learn after": Process(after=("sklearn",)),
    "both before": Process(before=("torch", "sklearn")),
    "both after": Process(after=("torch", "sklearn")),
}
QUICK_PROCESSES = (ALONE, "both before", "both after")


def names(settings: Settings) -> list[str]:
    """Return the names of the measured processes."""
    return list(QUICK_PROCESSES if settings.quick else PROCESSES)


def ticks(settings: Settings) -> int:
    """One per round of each size."""
    return settings.rounds * len(sizes(settings))


def sizes(settings: Settings) -> tuple[int, ...]:
    """Return the numbers of elements."""
    return QUICK_SIZES if settings.quick else SIZES


def run(settings: Settings, tick: Tick) -> Results:
    """Interleave the processes of all kinds, round by round, for each size."""
    missing = {name: child.absence(*PROCESSES[name].modules) for name in names(settings)}
    rows: list[dict[str, Any]] = []
    for elements in sizes(settings):
        measured: dict[str, list[Seconds]] = {
            name: [] for name, why in missing.items() if why is None
        }
        for rounds in turns(settings):
            for parts in contest(list(measured), elements, settings, rounds):
                for name, seconds in parts.items():
                    measured[name].append(seconds)
                tick(f"{elements:,}")
        times = {name: joined(parts) for name, parts in measured.items()}
        rows += [
            {
                "case": f"{elements:,}, {when}",
                "when": when,
                "dtype": "float32",
                "threads": settings.threads,
                "tensors": 1,
                "elements": elements,
                "seconds": {name: seconds[when] for name, seconds in times.items()},
            }
            for when in WHENS
        ]
    return {"rows": rows, "not_run": {name: why for name, why in missing.items() if why}}


def contest(
    names: Sequence[str], elements: int, settings: Settings, rounds: int
) -> Iterator[dict[str, Seconds]]:
    """Yield the times of each process, round by round."""
    variables = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    with contextlib.ExitStack() as processes:
        measuring = {
            name: processes.enter_context(
                child.begin(time_steps, name, elements, settings.threads, environment=variables)
            )
            for name in names
        }
        for _ in range(rounds):
            yield {name: next(process) for name, process in measuring.items()}


# ---- in a process of its own -------------------------------------------------------------------


def time_steps(name: str, elements: int, threads: int) -> Iterator[Seconds]:
    """Yield the seconds per step right after the other libraries' work, and later."""
    process = PROCESSES[name]
    work = [WORKS[module](threads) for module in process.before]
    import fusedadam

    fusedadam.set_num_threads(threads)
    work += [WORKS[module](threads) for module in process.after]
    step = make_step(elements)
    one = max(mean_of(step, 3), 1e-6)
    first = max(1, int(SPIN_S / one))
    later = max(2, min(MOST_STEPS, int(STEPS_S / one)))
    while True:
        for other in work or [busy]:
            other()
        right_after = mean_of(step, first)
        # Steps instead of a sleep, so that this thread and the step's threads keep their CPUs.
        end = time.perf_counter() + SLEEP_S
        while time.perf_counter() < end:
            step()
        yield {RIGHT_AFTER: [right_after], LATER: [mean_of(step, later)]}


def busy(seconds: float = 0.005) -> None:
    """Compute on this thread only."""
    some = np.ones(1 << 10, np.float32)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.add(some, 1, out=some)


def k_means(_threads: int) -> Callable[[], object]:
    """Import scikit-learn, and return a function that computes a k-means.

    It uses all threads of its runtime, whose number OMP_NUM_THREADS sets.
    """
    from sklearn.cluster import KMeans

    samples = np.random.default_rng(0).standard_normal((SAMPLES, 16)).astype(np.float32)
    model = KMeans(8, init="random", n_init=1, max_iter=5, tol=0, random_state=0)
    return lambda: model.fit(samples)


WORKS: dict[str, Callable[[int], Callable[[], object]]] = {
    "torch": torch_product,
    "sklearn": k_means,
}
