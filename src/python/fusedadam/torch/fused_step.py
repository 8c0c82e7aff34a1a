# SPDX-License-Identifier: MIT
"""The step behind `Adam` and `AdamW`: from torch's groups and state to one call of the kernel."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from fusedadam import _core
from fusedadam.locks import new_lock
from fusedadam.signals import without_interruption
from fusedadam.torch.local import any_distributed, local_gradient, local_tensor
from fusedadam.torch.state import ABSENT, conform, new_average, new_plan, new_states

if TYPE_CHECKING:
    from torch import Tensor

# Settings of a group beside torch's own, and what they are when off.
_EXTRAS: Final[dict[str, Any]] = {
    "max_grad_norm": None,
    "ema_decay": None,
    "zero_grad_in_step": False,
}

_SMALLEST_EPSILON_TO_FLUSH: Final = 1e-12


class FusedStep(torch.optim.Optimizer):
    """What `Adam` and `AdamW` add to torch's own classes, which keep settings and state."""

    _extras: Mapping[str, Any] = _EXTRAS

    def _use_extras(self, **extras: Any) -> None:
        """Settings of groups that name none; to be called before torch's own `__init__`."""
        self._extras = extras
        self._prepare()

    def _prepare(self) -> None:
        self._lock = new_lock()
        self._plan = new_plan()
        self._options: dict[int, tuple[tuple[Any, ...], _core.AdamOptions]] = {}
        # All parameters, where all have state and in the order of `state`; and that state.
        self._known_params: list[Tensor] = []
        self._known_states: list[dict[str, Any]] = []
        self._known_averages: list[bool] = []
        self._known_distributed = False
        # Of each group the number of parameters; of each parameter the group.
        self._known_sizes: list[int] = []
        self._known_groups: list[int] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; those not named are the optimizer's."""
        if isinstance(param_group, dict):
            for name, value in self._extras.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            self._options_of(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        # For a pickle, and by load_state_dict with what may come from torch's own optimizer.
        groups_before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self._extras = {name: self.defaults.get(name, off) for name, off in _EXTRAS.items()}
        for index, group in enumerate(self.param_groups):
            extras = groups_before[index] if index < len(groups_before) else self._extras
            for name in _EXTRAS:
                group.setdefault(name, extras[name])
        for param, own in self.state.items():
            if isinstance(param, torch.Tensor):
                conform(own, param)
        self._prepare()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange parameters and their averages: before an evaluation, and after it once more."""
        with self._lock:
            pairs = [
                (local_tensor(param), local_tensor(state["ema"]))
                for param, state in self.state.items()
                if "ema" in state
            ]
            # Bytes for one of them at a time.
            most = max((param.nbytes for param, _ in pairs), default=0)
            scratch = torch.empty(most, dtype=torch.uint8, device="cpu")
            calls: list[partial[Any]] = []
            for param, average in pairs:
                kept = scratch[: param.nbytes].view(param.dtype).view(param.shape)
                calls += [
                    partial(kept.copy_, average),
                    partial(average.copy_, param),
                    partial(param.copy_, kept),
                ]
            without_interruption(*calls)

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient, of all groups, in one pass.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss again and returns it; called with gradients enabled.

        Returns
        -------
        object
            What `closure` returned; None without one.

        Raises
        ------
        ValueError
            A tensor cannot be stepped in place, named by its index among all parameters; or a
            setting of a group is out of range. No parameter and no state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists = [group["params"] for group in self.param_groups]
        sizes = list(map(len, lists))
        if sizes != self._known_sizes:
            self._known_groups = [i for i, size in enumerate(sizes) for _ in range(size)]
            self._known_sizes = sizes  # last: an interrupt may come in between
        self._step(list(itertools.chain(*lists)), self._known_groups, self._plan)
        return loss

    @torch.no_grad()
    def _step(self, params: list[Tensor], groups: list[int], plan: _core.TensorPlan) -> None:
        """Step these parameters, each with the settings of its group."""
        # Both are set by torch.amp.GradScaler.
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        grad_scale = getattr(self, "grad_scale", None)
        scale = None if grad_scale is None else float(grad_scale)
        with self._lock, contextlib.ExitStack() as undo:
            options = [self._options_of(i, scale) for i in range(len(self.param_groups))]
            grads = list(map(operator.attrgetter("grad"), params))
            states = self._states(params, grads, groups, undo)
            known = states is self._known_states
            distributed = self._known_distributed if known else any_distributed(params)
            try:
                stepped = _call(plan, params, grads, states, groups, options, distributed)
            except ValueError:
                # Somebody gave a parameter or its state another layout: torch's steps allow that.
                changed = [conform(s, p) for s, p in zip(states, params, strict=True) if s]
                if not any(changed):
                    raise
                stepped = _call(plan, params, grads, states, groups, options, distributed)
            undo.pop_all()
        torch.autograd.graph.increment_version(stepped)
        if scale is not None or any(option.zero_grad for option in options):
            _leave_gradients(grads, [options[group].zero_grad for group in groups], scale)

    def _states(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        groups: list[int],
        undo: contextlib.ExitStack,
    ) -> list[dict[str, Any]]:
        """The state of each parameter with a gradient, begun where there is none yet."""
        own = self.state
        averages = [group["ema_decay"] is not None for group in self.param_groups]
        # To look a tensor up in a dict calls its __hash__, in Python: the most expensive thing here.
        if (
            averages == self._known_averages
            and all(self._known_states)
            and _core.same_objects(self._known_params, params)
            and _core.same_objects(self._known_states, list(own.values()))
        ):
            return self._known_states
        states = [
            ABSENT if grad is None else own[param]
            for param, grad in zip(params, grads, strict=True)
        ]
        undo.callback(self._forget_known)
        self._begin(params, groups, [i for i, state in enumerate(states) if not state], undo)
        for i, state in enumerate(states):
            if averages[groups[i]] and state is not ABSENT and "ema" not in state:
                # State of an optimizer that kept no averages.
                undo.callback(_forget_average, state, _steps(state))
                state["ema"] = new_average(params[i])
        if len(own) == len(params) and _core.same_objects(list(own), params):
            self._known_distributed = any_distributed(params)
            self._known_averages = averages
            self._known_params, self._known_states = params, states
        return states

    def _begin(
        self,
        params: list[Tensor],
        groups: list[int],
        positions: list[int],
        undo: contextlib.ExitStack,
    ) -> None:
        """Begin the state of the parameters at these positions, all in one piece of memory."""
        by_group: dict[int, list[int]] = {}
        for i in positions:
            by_group.setdefault(groups[i], []).append(i)
            undo.callback(self._forget_unless_stepped, params[i])
        for index, members in by_group.items():
            begun = new_states([params[i] for i in members], members, self.param_groups[index])
            for i, state in zip(members, begun, strict=True):
                self.state[params[i]].update(state)

    def _forget_known(self) -> None:
        """Look at all state again: some of it may not have been begun after all."""
        self._known_params, self._known_states = [], []

    def _forget_unless_stepped(self, param: Tensor) -> None:
        """Undo the beginning of its state. An interrupt may come when the step is over."""
        if not _steps(self.state.get(param, {})):
            self.state.pop(param, None)

    # ---- settings

    def _options_of(self, index: int, loss_scale: float | None = None) -> _core.AdamOptions:
        """The settings of a group as the kernel takes them."""
        group = self.param_groups[index]
        beta_1, beta_2 = group["betas"]
        settings = {
            "lr": float(group["lr"]),
            "beta_1": float(beta_1),
            "beta_2": float(beta_2),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW)),
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
            "capturable": group["capturable"],
            "differentiable": group["differentiable"],
            "max_grad_norm": group["max_grad_norm"],
            "ema_decay": group["ema_decay"],
            "zero_grad_in_step": group["zero_grad_in_step"],
            "loss_scale": loss_scale,
        }
        key = tuple(settings.values())
        known = self._options.get(index)
        if known is None or known[0] != key:
            known = self._options[index] = key, _checked_options(settings)
        return known[1]


def _steps(state: Mapping[str, Any]) -> float:
    return float(state.get("step") or 0)


def _forget_average(state: dict[str, Any], steps: float) -> None:
    if _steps(state) == steps:
        state.pop("ema", None)


def flushes(epsilon: float) -> bool:
    """Whether subnormal moments may become zero beside this epsilon, of a framework that keeps them.

    From 1e-12 on it makes no difference to an update: the root of the smallest normal float32 is
    1e-19. Below, a second moment of zero might divide by next to nothing.
    """
    return bool(epsilon >= _SMALLEST_EPSILON_TO_FLUSH)


def _checked_options(settings: Mapping[str, Any]) -> _core.AdamOptions:
    for name, reason in (
        ("capturable", "a step on the CPU is not captured in a graph"),
        ("differentiable", "autograd does not see into the step"),
    ):
        if settings[name]:
            raise ValueError(f"{name} must be False: {reason}. Received: {name}={settings[name]!r}")
    # Those that the kernel knows by another name.
    for name, upper in (
        ("eps", math.inf),
        ("weight_decay", math.inf),
        ("max_grad_norm", math.inf),
        ("ema_decay", 1.0),
    ):
        value = settings[name]
        if value is None and name in _EXTRAS:
            continue
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a real number. Received: {name}={value!r}")
        if not (0 <= value <= upper and math.isfinite(value)):
            rule = "finite and >= 0" if upper == math.inf else f">= 0 and <= {upper:g}"
            raise ValueError(f"{name} must be {rule}. Received: {name}={value!r}")
    ema_decay = settings["ema_decay"]
    return _core.AdamOptions(
        {
            "lr": settings["lr"],
            "beta_1": settings["beta_1"],
            "beta_2": settings["beta_2"],
            "epsilon": float(settings["eps"]),
            "bias_corrected_epsilon": True,
            "weight_decay" if settings["decoupled"] else "l2": float(settings["weight_decay"]),
            "amsgrad": bool(settings["amsgrad"]),
            "maximize": bool(settings["maximize"]),
            "clipnorm": settings["max_grad_norm"],
            "use_ema": ema_decay is not None,
            **({} if ema_decay is None else {"ema_momentum": ema_decay}),
            "zero_grad": bool(settings["zero_grad_in_step"]),
            "loss_scale": settings["loss_scale"],
            "flush_denormals": flushes(settings["eps"]),
        }
    )


# ---- the call of the kernel


def _call(
    plan: _core.TensorPlan,
    params: list[Any],
    grads: list[Any],
    states: list[dict[str, Any]],
    groups: list[int],
    options: list[_core.AdamOptions],
    distributed: bool,
) -> list[Any]:
    """Call the kernel, and return the tensors whose memory it has changed."""
    if distributed:
        if any(option.clipnorm for option in options):
            raise ValueError(
                "max_grad_norm must be None for DTensors, whose norm no process knows alone: use "
                "torch.nn.utils.clip_grad_norm_. Received: "
                f"max_grad_norm={max(option.clipnorm or 0 for option in options)!r}"
            )
        grads = [
            None if grad is None else local_gradient(grad, param)
            for grad, param in zip(grads, params, strict=True)
        ]
        params = [local_tensor(param) for param in params]
        states = [{k: local_tensor(value) for k, value in state.items()} for state in states]
    stepped = plan.step_counted(params, grads, states, groups, options)
    if stepped == len(params):
        return params
    return [param for param, grad in zip(params, grads, strict=True) if grad is not None]


def _leave_gradients(grads: list[Tensor | None], zeroed: list[bool], scale: float | None) -> None:
    """Leave gradients unscaled, as torch's own fused step does, and tell of those zeroed."""
    for grad, is_zeroed in zip(grads, zeroed, strict=True):
        if grad is None:
            continue
        if is_zeroed:
            if grad.layout == torch.strided:
                torch.autograd.graph.increment_version(local_tensor(grad))
        elif scale is not None:
            grad.div_(scale)
