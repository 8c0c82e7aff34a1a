# SPDX-License-Identifier: MIT
"""A hand-written loop, compiled by numba for this machine's CPU, with fastmath and all threads.

Square roots and divisions may be approximate, and the bits depend on the machine. One tensor is
divided among threads by elements; many, here of equal sizes, as a whole. A small amount of work is
done on one thread.
https://numba.readthedocs.io/en/stable/user/performance-tips.html
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peers import Array, Contender, Work, copies_to

# Elements. Smaller work does not pay for starting threads.
PARALLEL_SIZE = 32_768


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender. A step is one call of compiled code."""
    import numba

    numba.set_num_threads(threads)
    params, grads = list(work.params()), list(work.grads())
    streams = [params, grads, *([np.zeros_like(param) for param in params] for _ in range(2))]
    number = np.dtype(work.dtype).type
    h = work.hyper
    betas = (h.beta_1, 1 - h.beta_1, h.beta_2, 1 - h.beta_2)
    constants = tuple(map(number, (*betas, h.epsilon)))
    one, large = len(work.sizes) == 1, sum(work.sizes) >= PARALLEL_SIZE
    of_list: Any = numba.typed.List
    tensors = [stream[0] if one else of_list(stream) for stream in streams]
    update = compiled()[one, large]
    count = itertools.count(1)

    def step() -> object:
        t = next(count)
        lr_t = h.lr * math.sqrt(1 - h.beta_2**t) / (1 - h.beta_1**t)
        return update(*tensors, number(lr_t), *constants)

    return dict.fromkeys(names, Contender("hat", step, copies_to(grads), lambda: params))


@functools.cache
def compiled() -> dict[tuple[bool, bool], Callable[..., object]]:
    """Return the loops: over one tensor or many, for a small or a large amount of work."""
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

    def of_each(
        p: Any, g: Any, m: Any, v: Any, lr: Any, b1: Any, c1: Any, b2: Any, c2: Any, eps: Any
    ) -> None:
        for k in numba.prange(len(p)):
            serial(p[k], g[k], m[k], v[k], lr, b1, c1, b2, c2, eps)

    return {
        (True, False): serial,
        (True, True): parallel,
        (False, False): jit(of_each),
        (False, True): jit(of_each, parallel=True),
    }
