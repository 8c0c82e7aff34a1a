# SPDX-License-Identifier: MIT
"""Take steps with every option and print a digest of all results, which is equal on every machine.

    python .ci/step_digest.py [ISA]

prints a line of JSON: the supported instruction sets, the active one (ISA, or the library's choice),
the number of steps, the bytes hashed and their SHA-256. `.ci/old_cpus.py` runs it on many CPUs.

Inputs are random integers times powers of two. Other functions of NumPy or the C library may differ
in the last bit between CPUs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, TypeAlias

import fusedadam
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

STEPS = 12
# Each length leaves a different vector remainder. The last one spans several tiles.
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 2), (67,), (1031,), (2500,)]
# Large enough for a parallel region.
LARGE = [(40_000,), (3, 7001)]


def halving(iterations: int) -> float:
    """Return a decreasing learning rate."""
    return 0.25 * 0.5**iterations


ALL: dict[str, Any] = {
    "amsgrad": True, "weight_decay": 0.1, "l2": 0.2, "clipnorm": 0.5, "clipvalue": 0.1,
    "use_ema": True, "ema_overwrite_frequency": 3, "loss_scale": "dynamic", "zero_grad": True,
    "maximize": True, "gradient_accumulation_steps": 2,
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"lr": halving}, {"decay": 0.5}, {"beta_1": 0.75, "beta_2": 0.5, "epsilon": 1e-3},
    {"bias_corrected_epsilon": True}, {"flush_denormals": False}, {"amsgrad": True},
    {"weight_decay": 0.1}, {"l2": 0.1},
    {"clipnorm": 0.5}, {"clipnorm_per_tensor": 0.5}, {"clipvalue": 0.05},
    {"use_ema": True, "ema_momentum": 0.75}, {"use_ema": True, "ema_overwrite_frequency": 2},
    {"zero_grad": True}, {"maximize": True}, {"skip_nonfinite": True},
    {"loss_scale": 8.0}, {"loss_scale": "dynamic"}, {"gradient_accumulation_steps": 3}, ALL,
]  # fmt: skip
# What is stored in fewer bits. Without bfloat16, which NumPy does not have.
STORED: list[dict[str, Any]] = [
    {"moments": "float32"},
    {"moments": "packed"},
    {"moments": "packed", "seed": 3, "weight_decay": 0.1, "clipnorm": 0.5},
    {"rounding": "nearest", "amsgrad": True},
]


class Digest:
    """SHA-256 of arrays. All NaNs hash alike, since their bits depend on the CPU."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.bytes = 0
        self.steps = 0

    def add(self, *arrays: Array) -> None:
        """Hash arrays."""
        for array in arrays:
            if array.dtype.kind == "f":
                array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
            self.hash.update(array.tobytes())
            self.bytes += array.nbytes

    def add_optimizer(self, adam: fusedadam.Adam, params: list[Array]) -> None:
        """Hash the parameters and the state of an optimizer."""
        # `weights` starts with the step count.
        weights = [w.astype(np.float64) if w.ndim == 0 else w for w in adam.weights]
        self.add(*params, *weights, *adam.ema)
        self.add(np.array([adam.iterations, adam.current_loss_scale], np.float64))


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Draw numbers of both signs whose exponents span 24 bits; a tenth of them are zero."""
    wide = "float32" if dtype == "float16" else dtype
    fraction = rng.integers(-(2**23), 2**23, shape).astype(wide)
    drawn = np.ldexp(fraction, rng.integers(-39, -15, shape, dtype=np.int32))
    return np.asarray(np.where(rng.integers(0, 10, shape) == 0, 0, drawn), dtype=dtype)


def train(
    digest: Digest,
    shapes: list[tuple[int, ...]],
    steps: int,
    options: dict[str, Any],
    dtypes: tuple[str, ...] = ("float32", "float64"),
) -> None:
    """Take dense steps in two precisions at once, some with gradients that are not finite."""
    rng = np.random.default_rng(7)
    params = [values(rng, shape, dtype) for dtype in dtypes for shape in shapes]
    adam = fusedadam.Adam(**options)
    for step in range(steps):
        grads = [values(rng, p.shape, str(p.dtype)) for p in params]
        if step == steps - 2:  # parameters become NaN, unless the step is skipped
            grads[-1].flat[-1] = np.inf
            grads[-2].flat[0] = np.nan
        adam.apply_gradients(list(zip(grads, params, strict=True)))
        digest.add(*params, *grads)
        digest.steps += 1
    digest.add_optimizer(adam, params)


def train_table(digest: Digest, options: dict[str, Any], *, lazy: bool) -> None:
    """Take steps with gradients of rows, some of which repeat."""
    rng = np.random.default_rng(11)
    for dtype in ("float32", "float64"):
        table = values(rng, (97, 19), dtype)
        adam = fusedadam.Adam(**options)
        for _ in range(STEPS):
            indices = rng.integers(0, 97, 30)
            adam.apply_sparse(indices, values(rng, (30, 19), dtype), table, lazy=lazy)
            digest.steps += 1
        digest.add_optimizer(adam, [table])


def decay_into_subnormals(digest: Digest) -> None:
    """Let moments decay through the subnormal range, with and without flushing."""
    for flush in (True, False):
        params = [np.full(67, 1.0, dtype) for dtype in ("float32", "float64")]
        adam = fusedadam.Adam(beta_1=0.25, beta_2=0.25, flush_denormals=flush)
        for step in range(90):
            grads = [np.full_like(p, 2.0**-30 if step == 0 else 0.0) for p in params]
            adam.apply_gradients(list(zip(grads, params, strict=True)))
            digest.steps += 1
        digest.add_optimizer(adam, params)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fusedadam.set_isa(sys.argv[1])
    fusedadam.set_num_threads(2)
    digest = Digest()
    with np.errstate(all="ignore"):
        for options in OPTIONS:
            train(digest, SHAPES, STEPS, options)
            if "gradient_accumulation_steps" not in options:
                train_table(digest, options, lazy=True)
                train_table(digest, options, lazy=False)
        for options in (OPTIONS[0], OPTIONS[-1]):
            train(digest, LARGE, 4, options)
        for options in STORED:
            train(digest, [*SHAPES, *LARGE], 4, options, ("float16", "float32"))
        decay_into_subnormals(digest)
        rng = np.random.default_rng(13)
        norms = [fusedadam.global_norm([values(rng, (5003,), d)]) for d in ("float32", "float64")]
        digest.add(np.array(norms))
    print(json.dumps({
        "supported": fusedadam.supported_isas(),
        "active": fusedadam.active_isa(),
        "steps": digest.steps,
        "bytes": digest.bytes,
        "sha256": digest.hash.hexdigest(),
    }))  # fmt: skip
