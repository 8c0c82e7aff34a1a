# SPDX-License-Identifier: MIT
"""Steps under `jax.jit`, with donated parameters and moments: optax's Adam, and `fusedadam.jax`.

https://optax.readthedocs.io/en/latest/getting_started.html
https://docs.jax.dev/en/latest/buffer_donation.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from peers import Array, Contender, Work


def optimizer_of(name: str, *arguments: float, **more: Any) -> tuple[Any, Any]:
    """Return an optimizer, and its step: `step(grads, params, state) -> (params, state)`."""
    import optax

    if name == "optax":
        adam: Any = optax.adam(*arguments)

        def update(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = adam.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return adam, update
    import fusedadam.jax

    ours = fusedadam.jax.adam(*arguments, **more)
    return ours, lambda grads, params, state: ours.step(grads, state, params)


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:  # noqa: ARG001
    """Make the contender. JAX uses as many threads as the process may use CPUs."""
    import jax

    (name,) = names
    jax.config.update("jax_enable_x64", work.dtype == "float64")
    # The gradients are arguments, in memory of their own.
    more = {} if name == "optax" else {"keep_gradients": False}
    optimizer, update = optimizer_of(name, *vars(work.hyper).values(), **more)

    def on_device(arrays: Iterable[Array]) -> list[Any]:
        return [jax.numpy.array(array, copy=True) for array in arrays]

    compiled = jax.jit(update, donate_argnums=(1, 2))
    params = on_device(work.params())
    now = {"grads": on_device(work.grads()), "params": params, "state": optimizer.init(params)}

    def step() -> object:
        now["params"], now["state"] = compiled(now["grads"], now["params"], now["state"])
        return jax.block_until_ready(now["params"])

    def set_grads(grads: Iterable[Array]) -> None:
        now["grads"] = on_device(grads)

    def as_arrays() -> list[Array]:
        return [np.array(param) for param in now["params"]]

    return {name: Contender("algorithm 1", step, set_grads, as_arrays)}
