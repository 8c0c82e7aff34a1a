# SPDX-License-Identifier: MIT
"""The step of the Keras optimizers on the JAX backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from fusedadam import xla
from fusedadam._core import AdamOptions, needed_state
from fusedadam.keras.shared import KERAS_VERSION, STATE, FusedOptimizer, is_stepped


class JaxStep(FusedOptimizer):
    """An optimizer whose step is part of programs that JAX compiles."""

    _device_setting = "JAX_PLATFORMS"

    # Variables in which XLA leaves the gradients. It would map fresh memory for them at each step.
    _gradient_memory: Sequence[Any] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Older ones do not assign `loss_scale_factor` to what they wrap, which is needed below.
        if KERAS_VERSION < (3, 10):
            raise ValueError(
                f"fusedadam.keras.{type(self).__name__} must run on Keras 3.10 or later on the JAX "
                f"backend: install a later one. Received: keras.__version__={keras.__version__!r}"
            )
        super().__init__(*args, **kwargs)
        self._has_memory = True

    @property
    def loss_scale_factor(self) -> float | None:
        """Factor of the loss, as in Keras."""
        factor: float | None = self._loss_scale_factor
        return factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        self._loss_scale_factor = factor
        # LossScaleOptimizer and MultiOptimizer assign this to the optimizers that they wrap. They
        # write all `variables` to files, which must be those that Keras' optimizer has.
        self._has_memory = False
        for variable in self._gradient_memory:
            self._untrack_variable(variable)
        self._gradient_memory = ()

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the optimizer's variables."""
        if self.built:
            return
        super().build(var_list)
        if self._has_memory:
            self._gradient_memory = [
                self.add_variable_from_reference(v, "gradient_memory") if is_stepped(v) else None
                for v in var_list
            ]

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set the variables to their averages, as in Keras, but not to the same arrays.

        The next `fit` donates both.
        """
        super().finalize_variable_values(var_list)
        if self.use_ema:
            for variable in var_list:
                variable.assign(jnp.copy(variable.value))

    def save_own_variables(self, store: Any) -> None:
        """Write the variables that Keras' optimizer has."""
        with self._without_memory():
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Read the variables that Keras' optimizer has."""
        with self._without_memory():
            super().load_own_variables(store)

    @contextlib.contextmanager
    def _without_memory(self) -> Iterator[None]:
        every = self._variables[:]
        memory = set(map(id, self._gradient_memory))
        self._variables[:] = [v for v in every if id(v) not in memory]
        try:
            yield
        finally:
            self._variables[:] = every

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        indices = [self._get_variable_index(v) for v in trainable_variables]
        fuses_ema = self.use_ema and self._averages_all(trainable_variables)
        options = AdamOptions(self._settings(lr=0.0, use_ema=fuses_ema))
        given = list(map(_gradient, grads, trainable_variables))
        params = [v.value for v in trainable_variables]
        state = [
            {kind: getattr(self, STATE[kind])[i] for kind in needed_state(options, str(p.dtype))}
            for i, p in zip(indices, params, strict=True)
        ]
        memory = self._memory(indices)
        new_params, new_state, _ = xla.step(
            params,
            given,
            [{kind: v.value for kind, v in own.items()} for own in state],
            xla.using([v.value for v in memory], self._iterations.value),
            xla.rate(self._get_current_learning_rate()),
            options,
            [i for i, v in enumerate(trainable_variables) if not self._use_weight_decay(v)],
            keras_norms=True,
        )
        for variable, value in zip(trainable_variables, new_params, strict=True):
            variable.assign(value)
        for own, values in zip(state, new_state, strict=True):
            for kind, value in values.items():
                own[kind].assign(value)
        for variable, gradient in zip(memory, given, strict=False):
            if variable.value.dtype == gradient.dtype:
                variable.assign(gradient)
        if self.gradient_accumulation_steps:
            self._reset_accumulators()
        if self.use_ema and not fuses_ema:
            self._average()

    def _averages_all(self, variables: Sequence[Any]) -> bool:
        """Whether a step of these updates all moving averages, as each call of Keras does."""
        averages = self._model_variables_moving_average
        averaged = sum(average is not None for average in averages)
        return averaged == len(variables) and not self.gradient_accumulation_steps

    def _reset_accumulators(self) -> None:
        """Drop what has been accumulated, in calls that step."""
        steps = (self._iterations.value + 1) % self.gradient_accumulation_steps == 0
        for accumulator in self._accumulated_gradients:
            # With one condition for all, XLA would copy the accumulators.
            value = jax.lax.cond(steps, jnp.zeros_like, _unchanged, accumulator.value)
            accumulator.assign(value)

    def _average(self) -> None:
        self._update_model_variables_moving_average(self._trainable_variables)
        if self.ema_overwrite_frequency:
            overwrites = (self.iterations + 1) % self.ema_overwrite_frequency == 0
            averages = self._model_variables_moving_average
            for variable, average in zip(self._trainable_variables, averages, strict=True):
                if average is not None:
                    variable.assign(jnp.where(overwrites, average.value, variable.value))

    def _memory(self, indices: Sequence[int]) -> list[Any]:
        """Return the memory for these gradients, in programs that have it as an argument."""
        memory = [self._gradient_memory[i] for i in indices] if self._gradient_memory else []
        return memory if all(isinstance(v.value, jax.core.Tracer) for v in memory) else []

    def _device(self, variable: Any) -> str:
        if variable._value is None:  # until Keras leaves a `StatelessScope`
            return jax.default_backend()
        platforms = {device.platform for device in variable._value.devices()}
        return "cpu" if platforms == {"cpu"} else min(platforms - {"cpu"})


def _unchanged(array: Any) -> Any:
    return array


def _gradient(grad: Any, variable: Any) -> Any:
    if jnp.shape(grad) != variable.shape:
        raise ValueError(
            f"the gradient of {variable.path!r} must have the shape of the variable, "
            f"{variable.shape}. Received: shape={jnp.shape(grad)}"
        )
    return xla.readable(jnp.asarray(grad), keras.backend.standardize_dtype(variable.dtype))
