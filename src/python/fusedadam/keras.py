# SPDX-License-Identifier: MIT
"""Adam and AdamW for Keras 3 with the torch backend, stepped by the fused kernel.

Import `Adam` or `AdamW` from here instead of `keras.optimizers`; `model.compile`, `model.fit`,
callbacks, schedules, `get_config` and `.keras` files keep working. One call updates all variables
in place. The classes are subclasses of Keras' classes, with the same arguments and the same
variables in the same order, so either optimizer can load the other's state:

- A file saved with this optimizer loads in a program that imports `fusedadam.keras`. Elsewhere,
  pass `custom_objects={"fusedadam>Adam": keras.optimizers.Adam}`.
- A file saved with Keras' optimizer names Keras' class. Load it in four lines::

      model = keras.saving.load_model("model.keras", compile=False)
      model.compile(optimizer=fusedadam.keras.Adam(), loss="mse")
      model.optimizer.build(model.trainable_variables)
      model.load_weights("model.keras")  # also the optimizer's state and its learning rate

Where Keras and the kernel differ, Keras' own code runs: for the moving averages (`use_ema`) in
calls that only accumulate or lack a gradient, for a step whose norm for clipping is not finite, and
for unscaling gradients that are accumulated or whose scale is outside of 2**-127 to 2**127.

Other backends are refused. A compiled TensorFlow or JAX step can reach the kernel only through a
callback, whose arguments must not be modified, so every step would copy the whole state. That is
slower than Keras' own step; `docs/benchmarks.md` has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import is_
from typing import Any, Final, TypeVar

import keras
from keras.src.backend.common.stateless_scope import in_stateless_scope

from fusedadam._core import AdamOptions, AdamProgress, needed_state
from fusedadam.adapters import copy_like, divides_by, flushes
from fusedadam.locks import new_lock
from fusedadam.signals import assignments, together

if keras.backend.backend() == "torch":
    import torch

    from fusedadam._core import TensorPlan

__all__ = ["Adam", "AdamW"]

# Up to Keras 3.9, `_backend_apply_gradients` also increments `iterations`.
_COUNTS_CALLS: Final = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10)

_Function = TypeVar("_Function")

# Keras' attributes for the kernel's kinds of state.
_STATE: Final = {
    "m": "_momentums",
    "v": "_velocities",
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
_STORAGE: Final = {"moments": "auto", "low_bits": None, "rounding": "stochastic", "seed": 0}


def _not_traced(function: _Function) -> _Function:
    """Exclude a function from torch.compile (`jit_compile=True`), which cannot trace the kernel."""
    if keras.backend.backend() != "torch":
        return function
    disable: Any = torch.compiler.disable
    untraced: _Function = disable(function)
    return untraced


class _Bound:
    """A list of variables, their optimizer state, and the plan for stepping them."""

    def __init__(self, optimizer: Adam, variables: Sequence[Any], *, stateless: bool) -> None:
        self.variables = variables
        self.stateless = stateless
        indices = [optimizer._get_variable_index(v) for v in variables]
        kept = {kind: getattr(optimizer, name, None) for kind, name in _STATE.items()}
        if optimizer.moments == "packed":
            kept["packed"] = kept.pop("m")
            del kept["v"]
        self.state = {kind: [own[i] for i in indices] for kind, own in kept.items() if own}
        averages = kept["ema"] or []
        self.all_averages = sum(average is not None for average in averages) == len(variables)
        self.groups = [0 if optimizer._use_weight_decay(v) else 1 for v in variables]
        self.plan = TensorPlan(copy_like)

    def tensors(self, variables: Sequence[Any]) -> list[Any]:
        """Return the current tensors; Keras and users may replace them between steps."""
        # `value` checks for scopes at every access, which takes longer than stepping the tensor.
        name = "value" if self.stateless else "_value"
        return [None if v is None else getattr(v, name) for v in variables]


class _Like:
    """A variable with another shape or dtype, as a reference for a new one."""

    def __init__(self, variable: Any, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.name = variable.path, variable.name
        self._layout = getattr(variable, "_layout", None)
        self.shape, self.dtype = shape, dtype


class _Prepared:
    """Data cached between steps, in a separate object so that Keras does not track it."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.bound: _Bound | None = None
        self.settings: dict[str, Any] | None = None
        self.options: list[AdamOptions] = []
        self.loss_scale: float | None = None


@keras.saving.register_keras_serializable(package="fusedadam")
class Adam(keras.optimizers.Adam):  # type: ignore[misc] # Keras has no types
    """`keras.optimizers.Adam` with the fused kernel, in place, for the torch backend.

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
        The Keras backend is not torch, or a setting is out of range. From `build`: a variable is
        not on the CPU, or has another dtype.
    """

    loss_scale_factor: float | None

    @functools.wraps(keras.optimizers.Adam.__init__)  # type: ignore[misc] # as above
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        if keras.backend.backend() != "torch":
            raise ValueError(
                f"fusedadam.keras.{name} must run on the torch backend of Keras: set the "
                "environment variable KERAS_BACKEND=torch before importing keras. On other "
                "backends, each step would copy the whole state and be slower than "
                f"keras.optimizers.{name}. "
                f"Received: backend={keras.backend.backend()!r}"
            )
        storage = [kwargs.pop(name, default) for name, default in _STORAGE.items()]
        super().__init__(*args, **kwargs)
        self.moments, self.low_bits, self.rounding, self.seed = storage
        self._prepared = _Prepared()
        self._core_options(lr=0.0, use_ema=self.use_ema)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration; without the settings of storage that are at their defaults."""
        storage = {name: getattr(self, name) for name in _STORAGE}
        changed = {name: value for name, value in storage.items() if value != _STORAGE[name]}
        return {**super().get_config(), **changed}

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the optimizer's variables."""
        if self.built:
            return
        for variable in var_list:
            if not getattr(variable, "overwrite_with_gradient", False):
                _require_steppable(variable)
        super().build(var_list)
        if self.low_bits is not None:
            self._low_bits = [
                self.add_variable_from_reference(variable, "low_bits")
                if "low_bits" in self._needed_state(variable)
                else None
                for variable in var_list
            ]
        self._prepared.bound = None
        for name in _STATE.values():
            for own, variable in zip(getattr(self, name, None) or (), var_list, strict=False):
                if own is None or own._value.shape != variable._value.shape:
                    continue
                # Keras makes state contiguous, but some initializers return strided variables.
                if own._value.stride() != variable._value.stride():
                    own._value.data = copy_like(own._value, variable._value)

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
        options = self._core_options(lr=0.0, use_ema=self.use_ema)[0]
        return needed_state(options, keras.backend.standardize_dtype(variable.dtype))

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from weight decay, as in Keras."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._prepared.bound = None

    @_not_traced
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Take one step with these gradients, as in Keras; thread-safe."""
        with self._prepared.lock:
            self._apply(grads, trainable_variables)

    def _apply(self, grads: Any, trainable_variables: Any) -> None:
        scale = self.loss_scale_factor
        # Accumulators hold unscaled gradients.
        if scale is None or self.gradient_accumulation_steps or not divides_by(float(scale)):
            super().apply(grads, trainable_variables)
            return
        # Let the kernel unscale the gradients: Keras would copy all of them.
        hand_over = together(
            *assignments(self, loss_scale_factor=None),
            *assignments(self._prepared, loss_scale=scale),
        )
        give_back = together(
            *assignments(self, loss_scale_factor=scale),
            *assignments(self._prepared, loss_scale=None),
        )
        try:
            hand_over()
            super().apply(grads, trainable_variables)
        finally:
            give_back()

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        calls_per_step = self.gradient_accumulation_steps or 1
        iterations, accumulated = divmod(int(self._iterations), calls_per_step)
        steps = accumulated + 1 == calls_per_step
        bound = self._bound(trainable_variables)
        fuses_ema = self.use_ema and steps and bound.all_averages
        needed = {"vhat": self.amsgrad, "ema": fuses_ema, "accumulator": calls_per_step > 1}
        params = bound.tensors(bound.variables)
        state = {
            kind: bound.tensors(own) for kind, own in bound.state.items() if needed.get(kind, True)
        }
        lr = float(self._get_current_learning_rate()) if steps else 0.0
        options = self._core_options(lr=lr, use_ema=fuses_ema)
        progress = AdamProgress({"iterations": iterations, "accumulated": accumulated})
        bound.plan.step(params, grads, state, bound.groups, options, progress)
        if progress.skipped_steps and self._is_stored(params):
            progress = AdamProgress({"iterations": iterations, "accumulated": accumulated})
            taken = [option.changed({"skip_nonfinite": False}) for option in options]
            bound.plan.step(params, grads, state, bound.groups, taken, progress)
        elif progress.skipped_steps:
            # The norm is not finite. The kernel skips such a step; Keras still clips and steps.
            scale = self._prepared.loss_scale
            if scale is not None:
                grads = [g / scale for g in grads]
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        if steps:
            torch.autograd.graph.increment_version(params)
            if self.gradient_accumulation_steps:
                self._backend_reset_gradient_accumulators()
        if self.use_ema and not fuses_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            frequency = self.ema_overwrite_frequency
            if frequency and (iterations + 1) % frequency == 0:
                self._overwrite_model_variables_with_average_value(self._trainable_variables)
        if _COUNTS_CALLS:
            self._iterations.assign_add(1)

    def _is_stored(self, params: Sequence[Any]) -> bool:
        """Whether any state has another dtype than Keras would give it."""
        in_16_bits = any(param is not None and param.dtype.itemsize == 2 for param in params)
        return in_16_bits or self.moments in ("bfloat16", "packed")

    def _backend_reset_gradient_accumulators(self) -> None:
        with torch.no_grad():
            for accumulator in self._accumulated_gradients:
                accumulator.value.zero_()

    def _bound(self, variables: list[Any]) -> _Bound:
        if in_stateless_scope():
            return _Bound(self, variables, stateless=True)
        bound = self._prepared.bound
        if (
            bound is None
            or len(bound.variables) != len(variables)
            or not all(map(is_, bound.variables, variables))
        ):
            bound = self._prepared.bound = _Bound(self, variables, stateless=False)
        return bound

    def _core_options(self, *, lr: float, use_ema: bool) -> list[AdamOptions]:
        """Return the core's options for variables with weight decay, and for those without."""
        settings = {
            "lr": lr,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "amsgrad": self.amsgrad,
            "weight_decay": self.weight_decay,
            "use_ema": use_ema,
            "loss_scale": self._prepared.loss_scale,
            "gradient_accumulation_steps": self.gradient_accumulation_steps or None,
            "flush_denormals": flushes(self.epsilon),
            **{name: getattr(self, name) for name in _STORAGE},
        }
        if use_ema:
            settings["ema_momentum"] = self.ema_momentum
            settings["ema_overwrite_frequency"] = self.ema_overwrite_frequency or None
        # As in Keras, only the first of these that is on applies, and negative values are off.
        if self.clipnorm and self.clipnorm > 0:
            settings |= {"clipnorm_per_tensor": self.clipnorm, "skip_nonfinite": True}
        elif self.global_clipnorm and self.global_clipnorm > 0:
            settings |= {"clipnorm": self.global_clipnorm, "skip_nonfinite": True}
        elif self.clipvalue and self.clipvalue > 0:
            settings["clipvalue"] = self.clipvalue
        prepared = self._prepared
        if settings != prepared.settings:
            options = AdamOptions(settings)
            prepared.options = [options, options.changed({"weight_decay": None})]
            prepared.settings = settings
        return prepared.options


@keras.saving.register_keras_serializable(package="fusedadam")
class AdamW(Adam, keras.optimizers.AdamW):  # type: ignore[misc] # Keras has no types
    """`keras.optimizers.AdamW` with the fused kernel, in place, for the torch backend.

    The arguments are those of `keras.optimizers.AdamW`, and those of `Adam` here for storage.
    Otherwise as `Adam`.
    """

    @functools.wraps(keras.optimizers.AdamW.__init__)  # type: ignore[misc] # as above
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def _require_steppable(variable: Any) -> None:
    tensor = variable.value
    if tensor.device.type != "cpu":
        raise ValueError(
            f"variable {variable.path!r} must be on the CPU: set the environment variable "
            "KERAS_TORCH_DEVICE=cpu, or create the model within keras.device('cpu'). "
            f"Received: device={tensor.device.type!r}"
        )
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(
            f"variable {variable.path!r} must be float32, float64, bfloat16 or float16. "
            f"Received: dtype={variable.dtype!r}"
        )
