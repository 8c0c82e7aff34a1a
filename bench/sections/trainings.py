# SPDX-License-Identifier: MIT
"""Whole training steps in JAX, with the optimizer of optax or Keras and with ours.

Both are in one process, in turn, since a step of XLA uses all of its CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from runner import Bench, Row, not_run
from runner.worker import WorkerError, absence, call

BATCH, BATCHES = 16, 30
# Ours is the first. The stock optimizer has the name of its library.
FLAX, KERAS = ("fusedadam.jax", "optax"), ("fusedadam.keras", "keras")
# The optimizers; the width and the number of dense layers.
TRAININGS = {
    "flax, 1M": (FLAX, 354, 8),
    "flax, 10M": (FLAX, 707, 20),
    "flax, 67M": (FLAX, 2_896, 8),
    "Keras on JAX, 10M": (KERAS, 707, 20),
}


def trainings(bench: Bench) -> list[Row]:
    """Time training steps, and count the CPU time and the page faults of each."""
    rows = []
    for case, (names, *shape) in TRAININGS.items():
        width, layers = (8, 2) if bench.quick else shape
        arguments = (names, width, layers, bench.rounds)
        on_jax = {"KERAS_BACKEND": "jax"}
        try:
            if why := absence("jax", "flax", "optax", "keras"):
                raise WorkerError(why)
            found = call(measure, *arguments, threads=bench.threads, environment=on_jax)
        except WorkerError as error:
            rows.append(not_run(case, dict.fromkeys(names, str(error))))
        else:
            rows.append(bench.row(case, layers * (width + 1) * width, **found))
    return rows


def measure(names: tuple[str, ...], width: int, layers: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of a step in each round, of the clock and of the CPUs, and its faults."""
    import resource

    make, steps = (of_keras, BATCHES) if "keras" in names else (of_flax, 1)
    train = {name: make(name, width, layers) for name in names}
    found: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in names} for kind in ("seconds", "cpu_seconds", "faults")
    }

    def now() -> tuple[float, ...]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter(), time.process_time(), faults

    for round_ in range(rounds + 2):
        for name in names:
            begin = now()
            train[name]()
            spent = [(after - before) / steps for before, after in zip(begin, now(), strict=True)]
            for kind, of in zip(found, spent, strict=True):
                # The first rounds compile, and allocate.
                found[kind][name] += [of] if round_ >= 2 else []
    return found


def of_flax(name: str, width: int, layers: int) -> Callable[[], object]:
    """Return a step of a network of flax, with donated parameters and state."""
    import jax
    import jax.numpy as jnp
    from flax import linen
    from peers.jax_adam import optimizer_of

    parts = [part for _ in range(layers) for part in (linen.Dense(width), jnp.tanh)]
    network: Any = linen.Sequential(parts)
    x = jnp.ones((BATCH, width))
    params = network.init(jax.random.key(0), x)
    optimizer, update = optimizer_of(name, 1e-3)
    now = [params, optimizer.init(params)]

    def train(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: jnp.mean((network.apply(params, x) - 1) ** 2))(params)
        return update(grads, params, state)

    compiled = jax.jit(train, donate_argnums=(0, 1))

    def step() -> None:
        now[:] = jax.block_until_ready(compiled(*now))

    return step


def of_keras(name: str, width: int, layers: int) -> Callable[[], object]:
    """Return an epoch of `fit`."""
    import fusedadam.keras
    import keras
    import numpy as np

    dense = [keras.layers.Dense(width, activation="tanh") for _ in range(layers)]
    network = keras.Sequential([keras.Input((width,)), *dense])
    kind = fusedadam.keras.Adam if name.startswith("fusedadam") else keras.optimizers.Adam
    network.compile(optimizer=kind(1e-3), loss="mse")
    x = np.ones((BATCHES * BATCH, width), np.float32)
    return lambda: network.fit(x, x, batch_size=BATCH, verbose=0, shuffle=False)
