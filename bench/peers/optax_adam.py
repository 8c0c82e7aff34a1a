# SPDX-License-Identifier: MIT
"""optax's Adam under `jax.jit`, with donated buffers of parameters and moments.

https://optax.readthedocs.io/en/latest/getting_started.html
https://docs.jax.dev/en/latest/buffer_donation.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from peers import Array, Contender, Work, most_tensors

# XLA takes minutes to compile the step of ten times as many.
MOST_TENSORS = 1_000


def versions() -> dict[str, str]:
    """Import the packages and return their versions."""
    import jax
    import optax

    return {"jax": jax.__version__, "optax": optax.__version__}


def limit(name: str, work: Work) -> str:  # noqa: ARG001 - the interface of all adapters
    """Reject more tensors than XLA compiles in a few seconds."""
    return most_tensors(work, MOST_TENSORS, "10,000 take minutes to compile")


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:  # noqa: ARG001
    """Make the contender. JAX uses as many threads as the process may use CPUs."""
    return {name: OptaxStep(work) for name in names}


class OptaxStep(Contender):
    """`optimizer.update` and `optax.apply_updates`, compiled as one function."""

    form = "algorithm 1"

    def __init__(self, work: Work) -> None:
        import jax
        import optax

        config: Any = jax.config
        config.update("jax_enable_x64", work.dtype == "float64")
        hyper = work.hyper
        optimizer: Any = optax.adam(hyper.lr, hyper.beta_1, hyper.beta_2, hyper.epsilon)

        def update(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update: Any = jax.jit(update, donate_argnums=(1, 2))
        self._wait: Any = jax.block_until_ready
        self._params: Any = [on_device(array) for array in work.params()]
        self._grads = [on_device(array) for array in work.grads()]
        self._state: Any = optimizer.init(self._params)

    def step(self) -> object:
        """Take a step, and wait until it has completed."""
        self._params, self._state = self._update(self._grads, self._params, self._state)
        return self._wait(self._params)

    def set_grads(self, grads: Iterable[Array]) -> None:
        """Replace the gradients."""
        self._grads = [on_device(values) for values in grads]

    def params(self) -> list[Array]:
        """Return copies of the parameters."""
        return [np.array(param) for param in self._params]


def on_device(array: Array) -> Any:
    """Return a copy in JAX's memory."""
    import jax.numpy as jnp

    return jnp.array(array, copy=True)
