# SPDX-License-Identifier: MIT
"""Adam and AdamW for JAX on a CPU: the fused step inside of jitted programs, in place.

::

    optimizer = fusedadam.jax.adamw(1e-3)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        return optimizer.step(grads, state, params)

    params, state = train_step(params, state, batch)

Donate the parameters and the state, and return them in the order of the arguments: then nothing is
copied. Otherwise the step is right too, but XLA copies what it must keep.

`update` has the signature of optax. With it, an optimizer stands wherever an
`optax.GradientTransformation` can: in `optax.chain`, in flax' `TrainState`, in `nnx.Optimizer`.
"""

from __future__ import annotations

from typing import Final

from fusedadam import xla
from fusedadam.jax.optimizer import Optimizer, adam, adamw
from fusedadam.jax.state import AdamState, from_optax, to_optax

__all__ = ["CUSTOM_CALLS", "AdamState", "Optimizer", "adam", "adamw", "from_optax", "to_optax"]

# For `jax.export`, which asks for a `DisabledSafetyCheck.custom_call(name)` of each.
CUSTOM_CALLS: Final = tuple(xla.NAMES.values())
