# SPDX-License-Identifier: MIT
"""The step of the Keras optimizers on the torch backend."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Final

import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope

from fusedadam._core import AdamOptions, AdamProgress, TensorPlan
from fusedadam.adapters import copy_like, divides_by
from fusedadam.keras.shared import KERAS_VERSION, STATE, FusedOptimizer
from fusedadam.locks import new_lock
from fusedadam.signals import assignments, together

# Up to Keras 3.9, `_backend_apply_gradients` also increments `iterations`.
_COUNTS_CALLS: Final = KERAS_VERSION < (3, 10)

# torch.compile (`jit_compile=True`) cannot trace the kernel.
_not_traced: Final[Any] = torch.compiler.disable

_NORMS: Final = ("clipnorm", "clipnorm_per_tensor")


class _Bound:
    """A list of variables, their optimizer state, and the plan for stepping them."""

    def __init__(self, optimizer: TorchStep, variables: Sequence[Any], *, stateless: bool) -> None:
        self.variables = variables
        self.stateless = stateless
        indices = [optimizer._get_variable_index(v) for v in variables]
        without = ("m", "v") if optimizer.moments == "packed" else ("packed",)
        kept = {
            kind: getattr(optimizer, name, None)
            for kind, name in STATE.items()
            if kind not in without
        }
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


class _Prepared:
    """Data cached between steps, in a separate object so that Keras does not track it."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.bound: _Bound | None = None
        self.settings: dict[str, Any] | None = None
        self.options: list[AdamOptions] = []
        self.loss_scale: float | None = None


class TorchStep(FusedOptimizer):
    """An optimizer whose step changes tensors of torch in place."""

    loss_scale_factor: float | None
    _device_setting = "KERAS_TORCH_DEVICE"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared = _Prepared()

    def build(self, var_list: Sequence[Any]) -> None:
        """Create the optimizer's variables, in the memory layouts of the model's."""
        if self.built:
            return
        super().build(var_list)
        self._prepared.bound = None
        for name in STATE.values():
            for own, variable in zip(getattr(self, name, None) or (), var_list, strict=False):
                if own is None or own._value.shape != variable._value.shape:
                    continue
                # Keras makes state contiguous, but some initializers return strided variables.
                if own._value.stride() != variable._value.stride():
                    own._value.data = copy_like(own._value, variable._value)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Exclude variables from weight decay, as in Keras."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._prepared.bound = None

    @_not_traced  # type: ignore[untyped-decorator]
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
        prepared = self._prepared
        settings = self._settings(lr=lr, use_ema=use_ema)
        settings["loss_scale"] = prepared.loss_scale
        settings["skip_nonfinite"] = not settings.keys().isdisjoint(_NORMS)
        if settings != prepared.settings:
            options = AdamOptions(settings)
            prepared.options = [options, options.changed({"weight_decay": None})]
            prepared.settings = settings
        return prepared.options

    def _device(self, variable: Any) -> str:
        device: str = variable.value.device.type
        return device
