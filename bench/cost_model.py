# SPDX-License-Identifier: MIT
r"""A cost model of a float32 step: a formula whose constants are fitted to measurements.

A step of `tensors` tensors with n elements in total, on `threads` threads, takes this many seconds:

    call + fork + tensors * (f * tensor_cached + (1 - f) * tensor_memory)
         + n * (f * compute + (1 - f) * max(compute, 28 / bandwidth))

    f         = min(1, cache / (16 * n))    fraction of elements that stays in cache between steps
    compute   = 1 / (t * rate)              seconds per element; t = threads, or 1 in a small step
    bandwidth = min(t * core_bandwidth, memory_bandwidth)

`fork` applies only if t > 1. A step transfers 28 bytes per element (p, g, m and v are read; p, m
and v are written). p, g, m and v occupy 16 bytes per element. Computation and memory traffic
overlap, so the formula takes their maximum. Cached and uncached elements are stepped one after the
other, so their times are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rows import OURS, STEP_BYTES, all_elements, median

Vector: TypeAlias = NDArray[np.float64]

# p, g, m and v of one float32 element.
STATE_BYTES = 16
# Elements. A smaller step runs on the calling thread. Equal to smallest_shared in
# src/cpp/parallel/shared_pass.hpp.
SMALLEST_PARALLEL_STEP = 32_768

FITTED_SECTIONS = ("sizes", "many_tensors", "threads")


@dataclass(frozen=True)
class CostModel:
    """The constants of the formula, in seconds, elements per second, bytes per second and bytes."""

    call: float
    fork: float
    tensor_cached: float
    tensor_memory: float
    rate: float
    core_bandwidth: float
    memory_bandwidth: float
    cache: float

    def threads_of(self, elements: int, threads: int) -> int:
        """Return the number of threads that a step of this size uses."""
        return threads if elements >= SMALLEST_PARALLEL_STEP else 1

    def kept(self, elements: int) -> float:
        """Return the fraction of the elements that stays in cache between steps."""
        return min(1.0, self.cache / (STATE_BYTES * elements))

    def fixed(self, elements: int, threads: int) -> float:
        """Return the fixed seconds of a call, including `fork` if it uses several threads."""
        return self.call + (self.fork if self.threads_of(elements, threads) > 1 else 0.0)

    def bookkeeping(self, elements: int, tensors: int) -> float:
        """Return the seconds that are proportional to the number of tensors."""
        kept = self.kept(elements)
        return tensors * (kept * self.tensor_cached + (1 - kept) * self.tensor_memory)

    def work(self, elements: int, threads: int) -> float:
        """Return the seconds of computation and memory traffic."""
        t = self.threads_of(elements, threads)
        compute = 1 / (t * self.rate)
        memory = STEP_BYTES["float32"] / min(t * self.core_bandwidth, self.memory_bandwidth)
        kept = self.kept(elements)
        return elements * (kept * compute + (1 - kept) * max(compute, memory))

    def seconds(self, elements: int, *, tensors: int = 1, threads: int) -> float:
        """Return the seconds of a step. `elements` counts those of all tensors."""
        return (
            self.fixed(elements, threads)
            + self.bookkeeping(elements, tensors)
            + self.work(elements, threads)
        )


# The starting point of the fit: typical values of a current desktop.
START = CostModel(
    call=4e-6,
    fork=2e-6,
    tensor_cached=2e-7,
    tensor_memory=4e-7,
    rate=2e9,
    core_bandwidth=2e10,
    memory_bandwidth=5e10,
    cache=3e7,
)


class Sample(NamedTuple):
    """A measurement: what was stepped, and its median time."""

    section: str
    case: str
    tensors: int
    elements: int  # of all tensors
    threads: int
    seconds: float


class Fit(NamedTuple):
    """A fitted model, its samples, and the uncertainty of each constant."""

    model: CostModel
    samples: list[Sample]
    # Relative standard error; infinite if no measurement depends on the constant.
    uncertainty: dict[str, float]

    def residuals(self) -> list[float]:
        """Return predicted / measured - 1 for each sample."""
        return [predict(self.model, s) / s.seconds - 1 for s in self.samples]


def samples_of(sections: Mapping[str, Any]) -> list[Sample]:
    """Return fusedadam's float32 steps from the sections that the model is fitted to."""
    return [
        Sample(
            section,
            row["case"],
            row["tensors"],
            all_elements(row),
            row["threads"],
            median(row["seconds"][OURS]),
        )
        for section in FITTED_SECTIONS
        for row in sections[section]["rows"]
        if row["dtype"] == "float32" and OURS in row["seconds"]
    ]


def predict(model: CostModel, sample: Sample) -> float:
    """Return the predicted seconds of a sample."""
    return model.seconds(sample.elements, tensors=sample.tensors, threads=sample.threads)


def fit(samples: Sequence[Sample], cores: int) -> Fit:
    """Fit the constants by least squares over the logarithms of predicted / measured.

    For small errors, these logarithms are the relative errors. They give times from microseconds to
    seconds equal weight. Samples with more threads than `cores` are excluded: oversubscription adds
    no speed, which the model does not know.
    """
    samples = [s for s in samples if s.threads <= cores]
    names = [field.name for field in fields(CostModel)]
    if len(samples) < len(names):
        raise ValueError(
            f"samples must be at least {len(names)}, one a constant. Received: {len(samples)}"
        )

    def residuals(logarithms: Vector) -> Vector:
        model = CostModel(*map(float, np.exp(logarithms)))
        return np.array([math.log(predict(model, s) / s.seconds) for s in samples])

    # A search can get stuck at a kink of min or max, so several start from different cache sizes.
    start = np.log(astuple(START))
    cache = names.index("cache")
    searches = []
    for factor in (0.1, 0.3, 1.0, 3.0, 10.0):
        begin = start.copy()
        begin[cache] += math.log(factor)
        searches.append(levenberg_marquardt(residuals, begin))
    best = min(searches, key=lambda x: float(np.sum(residuals(x) ** 2)))
    errors = standard_errors(residuals, best)
    return Fit(CostModel(*map(float, np.exp(best))), samples, dict(zip(names, errors, strict=True)))


# ---- least squares -----------------------------------------------------------------------------


def levenberg_marquardt(residuals: Callable[[Vector], Vector], start: Vector) -> Vector:
    """Return a vector that minimizes the sum of squared residuals, searching from `start`."""
    x, r = start, residuals(start)
    damping = 1e-3
    for _ in range(500):
        jacobian = derivatives(residuals, x)
        normal = jacobian.T @ jacobian
        # An unknown that no residual depends on keeps its value.
        scale = np.maximum(np.diag(normal), 1e-12)
        # At most a factor of e at a time: far from the solution, full steps are unreliable.
        step = np.clip(
            np.linalg.solve(normal + damping * np.diag(scale), -jacobian.T @ r), -1.0, 1.0
        )
        tried_x: Vector = x + step
        tried = residuals(tried_x)
        if tried @ tried < r @ r:
            if np.max(np.abs(step)) < 1e-9:
                return tried_x
            x, r = tried_x, tried
            damping = max(damping / 3, 1e-12)
        else:
            damping *= 4
            if damping > 1e12:
                break
    return x


def derivatives(residuals: Callable[[Vector], Vector], x: Vector) -> Vector:
    """Return the Jacobian by central differences, one column per unknown."""
    h = 1e-5
    unit = np.eye(len(x)) * h
    columns = [(residuals(x + e) - residuals(x - e)) / (2 * h) for e in unit]
    return np.stack(columns, axis=1).astype(np.float64)


def standard_errors(residuals: Callable[[Vector], Vector], x: Vector) -> list[float]:
    """Return the standard error of each unknown; infinite if no residual depends on it."""
    r = residuals(x)
    jacobian = derivatives(residuals, x)
    matters = np.linalg.norm(jacobian, axis=0) > 1e-9
    known = jacobian[:, matters]
    variance = float(r @ r) / max(1, len(r) - known.shape[1])
    errors = np.full(len(x), np.inf)
    errors[matters] = np.sqrt(variance * np.diag(np.linalg.pinv(known.T @ known)))
    return [float(error) for error in errors]
