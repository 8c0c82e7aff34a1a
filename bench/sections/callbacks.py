# SPDX-License-Identifier: MIT
"""Keras's Adam on TensorFlow and JAX, against a callback from these backends to fusedadam's kernel.

The figures are the reason why `fusedadam.keras` refuses these backends. Keras's Adam runs inside of
a compiled step there, which can call other code only through a callback. A callback must not write
to its arguments, so it returns copies of parameters and moments. Each framework is measured in its
own process. All its contenders are interleaved and start from the same values, and their results
are compared with those of the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import child
import numpy as np
from peers import Array, Work
from peers.keras_adam import keras, optimizer
from processes import THREAD_VARIABLES
from settings import Results, Settings, Tick

TITLE = "Callbacks from Keras on TensorFlow and JAX"

NEEDS = {"tensorflow": ("keras", "tensorflow"), "jax": ("keras", "jax")}
SIZES = (1_000_000,) * 10
QUICK_SIZES = (1_000,) * 2
STEPS = 3  # per timing, after one warm-up step


class Entry(NamedTuple):
    """A contender: a function that takes a step, and one that returns a copy of the parameters."""

    step: Callable[[], object]
    params: Callable[[], list[Array]]


def ticks(settings: Settings) -> int:  # noqa: ARG001 - the interface of all sections
    """One per framework."""
    return len(NEEDS)


def run(settings: Settings, tick: Tick) -> Results:
    """Measure each framework that is installed."""
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    sizes = QUICK_SIZES if settings.quick else SIZES
    variables = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    for backend, modules in NEEDS.items():
        missing = child.absence(*modules)
        if missing is not None:
            not_run[f"Keras on {backend}"] = missing
        else:
            seconds = child.call(measure, backend, sizes, settings.rounds, environment=variables)
            rows.append(
                {
                    "case": f"Keras on {backend}, {len(sizes)} x {sizes[0]:,}",
                    "dtype": "float32",
                    "threads": settings.threads,
                    "tensors": len(sizes),
                    "elements": sizes[0],
                    "seconds": seconds,
                }
            )
        tick(backend)
    return {"rows": rows, "not_run": not_run}


def measure(backend: str, sizes: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per step of each contender, round by round."""
    work = Work(tuple(sizes))
    entries = {"tensorflow": tensorflow_entries, "jax": jax_entries}[backend](work)
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds):
        for name, entry in entries.items():
            entry.step()
            begin = time.perf_counter()
            for _ in range(STEPS):
                entry.step()
            seconds[name].append((time.perf_counter() - begin) / STEPS)
    require_same(entries, work, rounds * (STEPS + 1))
    return seconds


def require_same(entries: dict[str, Entry], work: Work, steps: int) -> None:
    """Raise if the parameters of contenders differ by more than rounding after `steps` steps."""
    first, *others = ((name, entry.params()) for name, entry in entries.items())
    for name, params in others:
        for a, b in zip(first[1], params, strict=True):
            # A step changes a parameter by about lr, with a rounding error far below a
            # ten-thousandth of that, and rounds the parameter once.
            bound = steps * (1e-4 * work.hyper.lr + np.finfo(a.dtype).eps * np.abs(a))
            if not (np.abs(a - b) <= bound).all():
                raise ArithmeticError(f"wrong result: {name} differs from {first[0]}")


class HostStep:
    """The callback. Takes parameters, both moments and gradients; copies the arrays it writes."""

    def __init__(self, work: Work) -> None:
        self._tensors = len(work.sizes)
        self._hyper = work.hyper
        self._steps = 0

    def __call__(self, *arrays: Any) -> list[Array]:
        """Take a step, and return the new parameters and moments."""
        import fusedadam

        n, hyper = self._tensors, self._hyper
        self._steps += 1
        kept = [np.array(array) for array in arrays[: 3 * n]]
        fusedadam.adam_step(
            kept[:n],
            [np.asarray(array) for array in arrays[3 * n :]],
            kept[n : 2 * n],
            kept[2 * n :],
            step=self._steps,
            lr=hyper.lr,
            beta_1=hyper.beta_1,
            beta_2=hyper.beta_2,
            epsilon=hyper.epsilon,
        )
        return kept


def zeros(work: Work) -> list[Array]:
    """Return the initial moments of all parameters."""
    return [np.zeros(size, work.dtype) for size in 2 * work.sizes]


def tensorflow_entries(work: Work) -> dict[str, Entry]:
    """Keras's own step, in a graph and compiled by XLA, and a step that calls the kernel."""
    from peers.tensorflow_adam import tensorflow

    variable: Any = keras("tensorflow").Variable
    tf = tensorflow()
    grads = [tf.Variable(array) for array in work.grads()]

    def entry(step: Callable[[], None], params: list[Any], *, compiled: bool) -> Entry:
        return Entry(
            tf.function(step, jit_compile=compiled),
            lambda: [np.array(param.value) for param in params],
        )

    def keras_step(*, compiled: bool) -> Entry:
        params = [variable(array) for array in work.params()]
        adam = optimizer(work, params)
        return entry(
            lambda: adam.apply([grad.read_value() for grad in grads], params),
            params,
            compiled=compiled,
        )

    def callback() -> Entry:
        params = [variable(array) for array in work.params()]
        kept = [*params, *(variable(array) for array in zeros(work))]
        host = HostStep(work)

        def step() -> None:
            arrays = [v.value for v in kept] + [grad.read_value() for grad in grads]
            fresh = tf.numpy_function(host, arrays, [tf.float32] * len(kept))
            for v, array in zip(kept, fresh, strict=True):
                v.assign(tf.ensure_shape(array, v.shape))

        return entry(step, params, compiled=False)

    return {
        "keras, a graph": keras_step(compiled=False),
        "keras, XLA": keras_step(compiled=True),
        "callback, a graph": callback(),
    }


def jax_entries(work: Work) -> dict[str, Entry]:
    """Keras's own step, compiled as by its trainer, and a step that calls the kernel."""
    variable: Any = keras("jax").Variable
    import jax

    grads = [jax.numpy.asarray(array) for array in work.grads()]

    def entry(step: Callable[..., Any], params: list[Any], state: list[Any]) -> Entry:
        compiled = jax.jit(step, donate_argnums=(0, 1))
        now = [params, state]

        def take() -> None:
            now[:] = compiled(*now, grads)
            jax.block_until_ready(now)

        return Entry(take, lambda: [np.array(param) for param in now[0]])

    def arrays_of(arrays: Any) -> list[Any]:
        return [jax.numpy.array(array) for array in arrays]

    def keras_step() -> Entry:
        variables = [variable(array) for array in work.params()]
        adam = optimizer(work, variables)
        return entry(
            lambda params, state, grads: adam.stateless_apply(state, grads, params),
            arrays_of(work.params()),
            arrays_of(v.value for v in adam.variables),
        )

    def callback() -> Entry:
        host, n = HostStep(work), len(work.sizes)
        shapes = [jax.ShapeDtypeStruct((size,), work.dtype) for size in 3 * work.sizes]

        def step(params: list[Any], moments: list[Any], grads: list[Any]) -> Any:
            kept = jax.pure_callback(host, shapes, *params, *moments, *grads)
            return kept[:n], kept[n:]

        return entry(step, arrays_of(work.params()), arrays_of(zeros(work)))

    return {"keras, compiled": keras_step(), "callback, compiled": callback()}
