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

BATCH = 16
# Ours is the first. The stock optimizer has the name of its library.
FLAX, KERAS = ("fusedadam.jax", "optax"), ("fusedadam.keras", "keras")
# The optimizers; the width and the number of dense layers; steps in a turn. As in a training, many
# steps follow each other: the first of a turn finds what the other optimizer left in the caches.
TRAININGS = {
    "flax, 1M": (FLAX, 354, 8, 30),
    "flax, 10M": (FLAX, 1_118, 8, 10),
    "flax, 10M, 20 layers": (FLAX, 707, 20, 10),
    "flax, 67M": (FLAX, 2_896, 8, 2),
    "Keras on JAX, 10M": (KERAS, 1_118, 8, 30),
    "Keras on JAX, 10M, 20 layers": (KERAS, 707, 20, 30),
}


def trainings(bench: Bench) -> list[Row]:
    """Time training steps, and count the CPU time and the page faults of each."""
    rows = []
    for case, (names, *shape) in TRAININGS.items():
        width, layers, steps = (8, 2, 1) if bench.quick else shape
        arguments = (names, width, layers, steps, bench.rounds)
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


def measure(
    names: tuple[str, ...], width: int, layers: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Return the seconds of a step in each round, of the clock and of the CPUs, and its faults."""
    import resource

    make = of_keras if "keras" in names else of_flax
    train = {name: make(name, width, layers, steps) for name in names}
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


def examples(count: int, width: int) -> Any:
    """Return inputs, which are the targets as well."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((count, width), np.float32)


def of_flax(name: str, width: int, layers: int, steps: int) -> Callable[[], None]:
    """Return steps of a network of flax, with donated parameters and state."""
    import jax
    import jax.numpy as jnp
    from flax import linen
    from peers.jax_adam import optimizer_of

    parts = [part for _ in range(layers) for part in (linen.Dense(width), jnp.tanh)]
    network: Any = linen.Sequential(parts)
    x = jnp.asarray(examples(BATCH, width))
    params = network.init(jax.random.key(0), x)
    optimizer, update = optimizer_of(name, 1e-3)
    now = [params, optimizer.init(params)]

    def train(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: jnp.mean((network.apply(params, x) - x) ** 2))(params)
        return update(grads, params, state)

    compiled = jax.jit(train, donate_argnums=(0, 1))

    def turn() -> None:
        for _ in range(steps):
            now[:] = jax.block_until_ready(compiled(*now))

    return turn


def of_keras(name: str, width: int, layers: int, steps: int) -> Callable[[], object]:
    """Return an epoch of `fit`."""
    import fusedadam.keras
    import keras

    dense = [keras.layers.Dense(width, activation="tanh") for _ in range(layers)]
    network = keras.Sequential([keras.Input((width,)), *dense])
    kind = fusedadam.keras.Adam if name.startswith("fusedadam") else keras.optimizers.Adam
    network.compile(optimizer=kind(1e-3), loss="mse")
    x = examples(steps * BATCH, width)
    return lambda: network.fit(x, x, batch_size=BATCH, verbose=0, shuffle=False)
