# SPDX-License-Identifier: MIT
"""What the Keras optimizers of all backends share: settings and the optimizer's variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import keras

from fusedadam._core import AdamOptions, needed_state
from fusedadam.adapters import flushes

KERAS_VERSION: Final = tuple(map(int, keras.__version__.split(".")[:2]))

# Keras' attributes for the kernel's kinds of state.
STATE: Final = {
    "m": "_momentums",
    "v": "_velocities",
    "packed": "_momentums",
    "vhat": "_velocity_hats",
    "ema": "_model_variables_moving_average",
    "accumulator": "_accumulated_gradients",
    "low_bits": "_low_bits",
}
# The kinds of state, by the names that Keras gives to its variables.
_KINDS: Final = {
    "momentum": "m",
    "velocity": "v",
    "velocity_hat": "vhat",
    "average": "ema",
    "gradient_accumulator": "accumulator",
    "low_bits": "low_bits",
}
_DTYPES: Final = ("float32", "float64", "bfloat16", "float16")
_STORAGE: Final = {"moments": "auto", "low_bits": None, "rounding": "stochastic", "seed": 0}


def is_stepped(variable: Any) -> bool:
    """Whether gradients step a variable, and do not take its place as with float8."""
    return not getattr(variable, "overwrite_with_gradient", False)


class _Like:
    """A variable with another shape or dtype, as a reference for a new one."""

    def __init__(self, variable: Any, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.name = variable.path, variable.name
        # A layout is for the dimensions of the variable; without one, Keras finds one by the path.
        self._layout = getattr(variable, "_layout", None) if shape == variable.shape else None
        self.shape, self.dtype = shape, dtype


class FusedOptimizer(keras.optimizers.Adam):  # type: ignore[misc] # Keras has no types
    """An optimizer without a step. See `fusedadam.keras.Adam`.

    The class of a backend adds `_backend_apply_gradients`, `_device`, which returns the type of a
    variable's device, and `_device_setting`, the environment variable that chooses it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, backend = type(self).__name__, keras.backend.backend()
        if backend not in ("torch", "jax"):
            raise ValueError(
                f"fusedadam.keras.{name} must run on the torch or JAX backend of Keras: set the "
                "environment variable KERAS_BACKEND=torch or KERAS_BACKEND=jax before importing "
                "keras. On other backends, each step would copy the whole state and be slower than "
                f"keras.optimizers.{name}. Received: backend={backend!r}"
            )
        storage = [kwargs.pop(name, default) for name, default in _STORAGE.items()]
        super().__init__(*args, **kwargs)
        self.moments, self.low_bits, self.rounding, self.seed = storage
        AdamOptions(self._settings(lr=0.0, use_ema=self.use_ema))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration; without the settings of storage that are at their defaults."""
        storage = {name: getattr(self, name) for name in _STORAGE}
        changed = {name: value for name, value in storage.items() if value != _STORAGE[name]}
        return {**super().get_config(), **changed}

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the optimizer's variables."""
        for variable in var_list:
            if is_stepped(variable):
                self._require_steppable(variable)
        super().build(var_list)
        if self.low_bits is not None:
            self._low_bits = [
                self.add_variable_from_reference(variable, "low_bits")
                if "low_bits" in self._needed_state(variable)
                else None
                for variable in var_list
            ]

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Add a variable of the optimizer, in the dtype that its kind is stored in."""
        needed = self._needed_state(reference_variable)
        shape, dtype = reference_variable.shape, reference_variable.dtype
        if self.moments == "packed" and name == "momentum":
            name, dtype = "packed_moments", needed["packed"]
        elif self.moments == "packed" and name == "velocity":
            shape = (0,)  # there is none, but each variable has a place for it
        else:
            dtype = needed.get(_KINDS.get(name or "", ""), dtype)
        like = _Like(reference_variable, shape, dtype)
        return super().add_variable_from_reference(like, name=name, initializer=initializer)

    def _needed_state(self, variable: Any) -> dict[str, str]:
        options = AdamOptions(self._settings(lr=0.0, use_ema=self.use_ema))
        return needed_state(options, keras.backend.standardize_dtype(variable.dtype))

    def _require_steppable(self, variable: Any) -> None:
        device = self._device(variable)
        if device != "cpu":
            raise ValueError(
                f"variable {variable.path!r} must be on the CPU: set the environment variable "
                f"{self._device_setting}=cpu, or create the model within keras.device('cpu'). "
                f"Received: device={device!r}"
            )
        if keras.backend.standardize_dtype(variable.dtype) not in _DTYPES:
            raise ValueError(
                f"variable {variable.path!r} must be float32, float64, bfloat16 or float16. "
                f"Received: dtype={variable.dtype!r}"
            )

    def _settings(self, *, lr: float, use_ema: bool) -> dict[str, Any]:
        """Return the core's settings for variables with weight decay."""
        settings = {
            "lr": lr,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "amsgrad": self.amsgrad,
            "weight_decay": self.weight_decay,
            "use_ema": use_ema,
            "gradient_accumulation_steps": self.gradient_accumulation_steps or None,
            "flush_denormals": flushes(self.epsilon),
            **{name: getattr(self, name) for name in _STORAGE},
        }
        if use_ema:
            settings["ema_momentum"] = self.ema_momentum
            settings["ema_overwrite_frequency"] = self.ema_overwrite_frequency or None
        # As in Keras, only the first of these that is on applies, and negative values are off.
        if self.clipnorm and self.clipnorm > 0:
            settings["clipnorm_per_tensor"] = self.clipnorm
        elif self.global_clipnorm and self.global_clipnorm > 0:
            settings["clipnorm"] = self.global_clipnorm
        elif self.clipvalue and self.clipvalue > 0:
            settings["clipvalue"] = self.clipvalue
        return settings
