# SPDX-License-Identifier: MIT
"""optax's Adam under `jax.jit`, with donated buffers of parameters and moments.

https://optax.readthedocs.io/en/latest/getting_started.html
https://docs.jax.dev/en/latest/buffer_donation.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from peers import Array, Contender, Work


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:  # noqa: ARG001
    """Make the contender. JAX uses as many threads as the process may use CPUs."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", work.dtype == "float64")
    optimizer: Any = optax.adam(*vars(work.hyper).values())

    def update(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

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

    return dict.fromkeys(names, Contender("algorithm 1", step, set_grads, as_arrays))
