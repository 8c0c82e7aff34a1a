# SPDX-License-Identifier: MIT
"""A hand-written loop, compiled by numba for this machine's CPU, with fastmath and all threads.

Square roots and divisions may be approximate, and the bits depend on the machine. A large tensor is
divided among threads by elements. Of many tensors, the small ones are distributed among threads as
a whole. A small amount of work is done on one thread.
https://numba.readthedocs.io/en/stable/user/performance-tips.html
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from peers import Array, Contender, Work

# Elements. Smaller work does not pay for starting threads.
PARALLEL_SIZE = 32_768


def versions() -> dict[str, str]:
    """Import numba and return its version."""
    import numba

    return {"numba": numba.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Accept all work."""
    return ""


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    import numba

    numba.set_num_threads(threads)
    return {name: NumbaStep(work) for name in names}


class NumbaStep(Contender):
    """A step is one call of compiled code."""

    form = "hat"

    def __init__(self, work: Work) -> None:
        self._params = list(work.params())
        self._grads = list(work.grads())
        streams = [self._params, self._grads]
        streams += [[np.zeros_like(param) for param in self._params] for _ in range(2)]
        self._hyper = work.hyper
        number = np.dtype(work.dtype).type
        self._constants = tuple(
            number(x)
            for x in (
                work.hyper.beta_1,
                1 - work.hyper.beta_1,
                work.hyper.beta_2,
                1 - work.hyper.beta_2,
                work.hyper.epsilon,
            )
        )
        self._number: Callable[[float], Any] = number
        self._t = 0
        kernels = compiled()
        self._tensors: tuple[Any, ...]
        if len(work.sizes) == 1:
            self._tensors = tuple(stream[0] for stream in streams)
            large = work.sizes[0] >= PARALLEL_SIZE
            self._update = kernels.one_large if large else kernels.one_small
        else:
            self._tensors = tuple(kernels.typed_list(stream) for stream in streams)
            whole = sum(work.sizes) < PARALLEL_SIZE
            self._update = kernels.few if whole else kernels.many

    def step(self) -> object:
        """Take a step."""
        self._t += 1
        hyper = self._hyper
        lr_t = hyper.lr * math.sqrt(1 - hyper.beta_2**self._t) / (1 - hyper.beta_1**self._t)
        return self._update(*self._tensors, self._number(lr_t), *self._constants)

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Copy arrays into the gradients."""
        for grad, values in zip(self._grads, grads, strict=True):
            grad[...] = values

    def params(self) -> list[Array]:
        """Return the arrays themselves."""
        return self._params


class Kernels(NamedTuple):
    """Compiled loops over one tensor or a list of tensors, and the constructor of such a list."""

    one_small: Callable[..., object]
    one_large: Callable[..., object]
    few: Callable[..., object]
    many: Callable[..., object]
    typed_list: Callable[[list[Array]], Any]


@functools.cache
def compiled() -> Kernels:
    """Compile the loops."""
    import numba

    def update(
        p: Array,
        g: Array,
        m: Array,
        v: Array,
        lr: Any,
        b1: Any,
        c1: Any,
        b2: Any,
        c2: Any,
        eps: Any,
    ) -> None:
        for i in numba.prange(p.size):
            gradient = g[i]
            m_i = b1 * m[i] + c1 * gradient
            v_i = b2 * v[i] + c2 * (gradient * gradient)
            m[i] = m_i
            v[i] = v_i
            p[i] -= lr * m_i / (np.sqrt(v_i) + eps)

    # NumPy's error model has no checks for division by zero, which would prevent vectorization.
    jit: Any = functools.partial(numba.njit, fastmath=True, error_model="numpy")
    serial: Any = jit(update)
    parallel: Any = jit(update, parallel=True)

    def few(
        p: Any, g: Any, m: Any, v: Any, lr: Any, b1: Any, c1: Any, b2: Any, c2: Any, eps: Any
    ) -> None:
        for k in range(len(p)):
            serial(p[k], g[k], m[k], v[k], lr, b1, c1, b2, c2, eps)

    def many(
        p: Any, g: Any, m: Any, v: Any, lr: Any, b1: Any, c1: Any, b2: Any, c2: Any, eps: Any
    ) -> None:
        for k in numba.prange(len(p)):
            if p[k].size < PARALLEL_SIZE:
                serial(p[k], g[k], m[k], v[k], lr, b1, c1, b2, c2, eps)
        for k in range(len(p)):
            if p[k].size >= PARALLEL_SIZE:
                parallel(p[k], g[k], m[k], v[k], lr, b1, c1, b2, c2, eps)

    return Kernels(
        one_small=serial,
        one_large=parallel,
        few=jit(few),
        many=jit(many, parallel=True),
        typed_list=numba.typed.List,
    )
