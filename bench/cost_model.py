# SPDX-License-Identifier: MIT
r"""What a float32 step costs: a formula with few constants, fitted to measurements, and what it predicts elsewhere.

A step of `tensors` tensors with n elements together, on `threads` threads, takes (seconds)

    call + fork + tensors * (f * tensor_cached + (1 - f) * tensor_memory)
         + n * (f * compute + (1 - f) * max(compute, 28 / bandwidth))

    f         = min(1, cache / (16 * n))       share of the elements that the caches keep from step to step
    compute   = 1 / (t * rate)                 seconds an element; t = threads, or 1 in a small step
    bandwidth = min(t * core_bandwidth, memory_bandwidth)

`fork` is there only where t > 1. 28 bytes an element go through memory in a step (p, g, m, v read; p, m, v written), and 16
are what p, g, m and v take. The formula is a maximum since computing and memory overlap, and a sum over what the caches keep
and what they do not, since those elements come one after the other.
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

# Of p, g, m and v of one float32 element.
STATE_BYTES = 16
# Elements below which a step stays on the calling thread: smallest_shared in
# src/cpp/parallel/shared_pass.hpp.
SMALLEST_PARALLEL_STEP = 32_768

FITTED_SECTIONS = ("sizes", "many_tensors", "threads")


@dataclass(frozen=True)
class CostModel:
    """The constants of the formula; seconds, elements a second, bytes a second and bytes."""

    call: float
    fork: float
    tensor_cached: float
    tensor_memory: float
    rate: float
    core_bandwidth: float
    memory_bandwidth: float
    cache: float

    def threads_of(self, elements: int, threads: int) -> int:
        """Return how many threads a step of so many elements uses."""
        return threads if elements >= SMALLEST_PARALLEL_STEP else 1

    def kept(self, elements: int) -> float:
        """Return the share of the elements that the caches keep from step to step."""
        return min(1.0, self.cache / (STATE_BYTES * elements))

    def fixed(self, elements: int, threads: int) -> float:
        """Return the seconds that a call takes whatever its tensors."""
        return self.call + (self.fork if self.threads_of(elements, threads) > 1 else 0.0)

    def bookkeeping(self, elements: int, tensors: int) -> float:
        """Return the seconds that go with the number of tensors."""
        kept = self.kept(elements)
        return tensors * (kept * self.tensor_cached + (1 - kept) * self.tensor_memory)

    def work(self, elements: int, threads: int) -> float:
        """Return the seconds that go with the number of elements."""
        t = self.threads_of(elements, threads)
        compute = 1 / (t * self.rate)
        memory = STEP_BYTES["float32"] / min(t * self.core_bandwidth, self.memory_bandwidth)
        kept = self.kept(elements)
        return elements * (kept * compute + (1 - kept) * max(compute, memory))

    def seconds(self, elements: int, *, tensors: int = 1, threads: int) -> float:
        """Return the time of a step of so many elements in all."""
        return (
            self.fixed(elements, threads)
            + self.bookkeeping(elements, tensors)
            + self.work(elements, threads)
        )


# Where the search begins: a desktop of these years.
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
    """A measurement: what was stepped, and the median seconds of it."""

    section: str
    case: str
    tensors: int
    elements: int  # of all tensors
    threads: int
    seconds: float


class Fit(NamedTuple):
    """A fitted model, what it was fitted to, and how well each constant is known."""

    model: CostModel
    samples: list[Sample]
    # Standard error over the constant itself; infinite where no measurement depends on it.
    uncertainty: dict[str, float]

    def residuals(self) -> list[float]:
        """Return predicted / measured - 1 of each sample."""
        return [predict(self.model, s) / s.seconds - 1 for s in self.samples]


def samples_of(sections: Mapping[str, Any]) -> list[Sample]:
    """Return the float32 steps of fusedadam in the sections that the model is fitted to."""
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
    """Return the seconds that the model gives a sample."""
    return model.seconds(sample.elements, tensors=sample.tensors, threads=sample.threads)


def fit(samples: Sequence[Sample], cores: int) -> Fit:
    """Fit the constants by least squares over the logarithms of predicted / measured.

    Logarithms, since times from microseconds to seconds shall weigh the same; for small errors they are the relative errors.
    More threads than `cores` cost what the cores do: such rows are left out.
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

    # The kinks of min and max can hold a search up: it starts from several sizes of caches.
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
    """Return the vector near `start` whose residuals have the least sum of squares."""
    x, r = start, residuals(start)
    damping = 1e-3
    for _ in range(500):
        jacobian = derivatives(residuals, x)
        normal = jacobian.T @ jacobian
        # A constant on which nothing depends here keeps its value.
        scale = np.maximum(np.diag(normal), 1e-12)
        # At most a factor of e at a time: far from the solution a full step says little.
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
    """Return the matrix of central differences, one column an unknown."""
    h = 1e-5
    unit = np.eye(len(x)) * h
    columns = [(residuals(x + e) - residuals(x - e)) / (2 * h) for e in unit]
    return np.stack(columns, axis=1).astype(np.float64)


def standard_errors(residuals: Callable[[Vector], Vector], x: Vector) -> list[float]:
    """Return the standard error of each unknown, infinite where no residual depends on it."""
    r = residuals(x)
    jacobian = derivatives(residuals, x)
    matters = np.linalg.norm(jacobian, axis=0) > 1e-9
    known = jacobian[:, matters]
    variance = float(r @ r) / max(1, len(r) - known.shape[1])
    errors = np.full(len(x), np.inf)
    errors[matters] = np.sqrt(variance * np.diag(np.linalg.pinv(known.T @ known)))
    return [float(error) for error in errors]
