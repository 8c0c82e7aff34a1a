# SPDX-License-Identifier: MIT
"""`python -m fusedadam check`: the same bits on every CPU, instruction set and number of threads.

Steps with every option and way of storing, and compares a digest of all results with the published
one. Inputs are random integers times powers of two, since other functions of NumPy or the C library
may differ in the last bit between CPUs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

import fusedadam
from fusedadam.arrays import dtype_named

Array: TypeAlias = npt.NDArray[Any]

# The SHA-256 of all results, in the dtypes of NumPy and in bfloat16, which `ml_dtypes` has.
PUBLISHED: Final = {
    "numpy": "cb56be7398a015676379252e63d835697374ad8843a1b185cb5c3a53080bc2a9",
    "bfloat16": "d7d50b6b5eb9dbd78bae8865f55b340504919a88bde7ab2037f0a1696c9be356",
}

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
STORED: list[dict[str, Any]] = [
    {"moments": "float32"},
    {"moments": "packed"},
    {"moments": "packed", "seed": 3, "weight_decay": 0.1, "clipnorm": 0.5},
    {"rounding": "nearest", "amsgrad": True},
]
IN_BFLOAT16: list[dict[str, Any]] = [
    {"moments": "bfloat16"},
    {"moments": "bfloat16", "rounding": "nearest"},
    {"moments": "float32", "low_bits": "int16", "use_ema": True},
    {"moments": "packed", "low_bits": "int8", "seed": 3, "weight_decay": 0.1, "clipnorm": 0.5},
    {"moments": "bfloat16", "low_bits": "int8", "gradient_accumulation_steps": 2},
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
            if array.dtype.kind not in "iu":
                array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
            self.hash.update(array.tobytes())
            self.bytes += array.nbytes

    def add_optimizer(self, adam: fusedadam.Adam, params: list[Array]) -> None:
        """Hash the parameters and the state of an optimizer."""
        # `weights` starts with the step count.
        weights = [w.astype(np.float64) if w.ndim == 0 else w for w in adam.weights]
        self.add(*params, *weights, *adam.ema)
        if adam.low_bits is not None:
            self.add(*adam.master_weights(params))
        self.add(np.array([adam.iterations, adam.current_loss_scale], np.float64))


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Draw numbers of both signs whose exponents span 24 bits; a tenth of them are zero."""
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    fraction = rng.integers(-(2**23), 2**23, shape).astype(wide)
    drawn = np.ldexp(fraction, rng.integers(-39, -15, shape, dtype=np.int32))
    return np.asarray(np.where(rng.integers(0, 10, shape) == 0, 0, drawn), dtype_named(dtype))


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


def digest_of(dtypes: str) -> Digest:
    """Take all steps in the dtypes of this name in `PUBLISHED`."""
    digest = Digest()
    with np.errstate(all="ignore"):
        if dtypes == "bfloat16":
            for options in IN_BFLOAT16:
                # Parameters of float32 have no low bits.
                train(digest, [*SHAPES, *LARGE], 4, options, ("bfloat16", "float32"))
            return digest
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
    return digest


def check(isas: Sequence[str], threads: Sequence[int]) -> bool:
    """Print the digests, and return whether all are as published."""
    supported = ", ".join(fusedadam.supported_isas())
    print(f"instruction sets: {supported} (active: {fusedadam.active_isa()})")
    dtypes = [name for name in PUBLISHED if name != "bfloat16" or find_spec("ml_dtypes")]
    same = True
    for isa, count, name in itertools.product(isas, threads, dtypes):
        fusedadam.set_isa(isa)
        fusedadam.set_num_threads(count)
        digest = digest_of(name)
        found = digest.hash.hexdigest()
        same &= found == PUBLISHED[name]
        verdict = "as published" if found == PUBLISHED[name] else "NOT AS PUBLISHED"
        words = f"{digest.steps:,} steps, {digest.bytes:,} bytes, SHA-256 {found[:16]}"
        print(f"{isa}, {count} threads, {name}: {words}, {verdict}", flush=True)
    if len(dtypes) < len(PUBLISHED):
        print("bfloat16 was left out: it needs ml_dtypes")
    return same
