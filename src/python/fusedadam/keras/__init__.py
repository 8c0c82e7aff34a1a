# SPDX-License-Identifier: MIT
"""Adam and AdamW for Keras 3 with the torch or JAX backend, stepped by the fused kernel.

Import `Adam` or `AdamW` from here instead of `keras.optimizers`; `model.compile`, `model.fit`,
callbacks, schedules, `get_config` and `.keras` files keep working. One call updates all variables
in place. The classes are subclasses of Keras' classes, with the same arguments and the same
variables in files, so either optimizer can load the other's state, on either backend:

- A file saved with this optimizer loads in a program that imports `fusedadam.keras`. Elsewhere,
  pass `custom_objects={"fusedadam>Adam": keras.optimizers.Adam}`.
- A file saved with Keras' optimizer names Keras' class. Load it in four lines::

      model = keras.saving.load_model("model.keras", compile=False)
      model.compile(optimizer=fusedadam.keras.Adam(), loss="mse")
      model.optimizer.build(model.trainable_variables)
      model.load_weights("model.keras")  # also the optimizer's state and its learning rate

On the torch backend, Keras' own code runs where it differs from the kernel: for the moving averages
(`use_ema`) in calls that only accumulate or lack a gradient, for a step whose norm for clipping is
not finite, and for unscaling gradients that are accumulated or whose scale is outside of 2**-127 to
2**127.

On the JAX backend, the step is part of the jitted training step, in place because Keras donates the
state. Keras' own code runs for the moving averages with `gradient_accumulation_steps` or if a
gradient is lacking, and for `loss_scale_factor`. The optimizer also has a variable of the size of
each gradient, last in `variables` and not in files, in which XLA leaves the gradients of each step:
otherwise it would map fresh memory for them at each step. Optimizers within others, such as
`LossScaleOptimizer`, have none. Without `jit_compile`, each step copies the state.

Other backends are refused. TensorFlow has no call that writes into the memory of its arguments, so
every step would copy the whole state, which is slower than Keras' own step; `docs/benchmarks.md`
has the figures.
"""

from __future__ import annotations

import functools
from typing import Any

import keras

__all__ = ["Adam", "AdamW"]


def _implementation() -> Any:
    """Return the class for the backend. The frameworks of other backends are not imported."""
    if keras.backend.backend() == "torch":
        from fusedadam.keras.torch_step import TorchStep

        return TorchStep
    if keras.backend.backend() == "jax":
        from fusedadam.keras.jax_step import JaxStep

        return JaxStep
    from fusedadam.keras.shared import FusedOptimizer

    return FusedOptimizer


@keras.saving.register_keras_serializable(package="fusedadam")
class Adam(_implementation()):  # type: ignore[misc] # Keras has no types
    """`keras.optimizers.Adam` with the fused kernel, in place, for the torch and JAX backends.

    The arguments are those of `keras.optimizers.Adam`, and those below. Variables must be float32,
    float64, bfloat16 or float16, and on the CPU; those of 16 bits are computed in float32.

    Parameters
    ----------
    moments : {"auto", "float32", "bfloat16", "packed"}, default "auto"
        How the moments are stored: "auto" is "bfloat16" for 16-bit variables (as in Keras, but
        rounded stochastically), and the precision of the variable for others; "packed" is one
        16-bit word for both, and excludes `amsgrad`. Averages and accumulated gradients of 16-bit
        variables are float32.
    low_bits : {None, "int8", "int16"}, default None
        Keep this many more bits of each bfloat16 variable in the optimizer.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        Of what is stored in 16 bits.
    seed : int, default 0
        Of stochastic rounding, >= 0.

    Raises
    ------
    ValueError
        The Keras backend is neither torch nor JAX, or a setting is out of range. From `build`: a
        variable is not on the CPU, or has another dtype.
    """

    @functools.wraps(keras.optimizers.Adam.__init__)  # type: ignore[misc] # as above
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@keras.saving.register_keras_serializable(package="fusedadam")
class AdamW(Adam, keras.optimizers.AdamW):  # type: ignore[misc] # Keras has no types
    """`keras.optimizers.AdamW` with the fused kernel, in place, for the torch and JAX backends.

    The arguments are those of `keras.optimizers.AdamW`, and those of `Adam` here for storage.
    Otherwise as `Adam`.
    """

    @functools.wraps(keras.optimizers.AdamW.__init__)  # type: ignore[misc] # as above
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
