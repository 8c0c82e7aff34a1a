# SPDX-License-Identifier: MIT
"""The step behind `Adam` and `AdamW`: from torch's groups and state to one call of the kernel."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from fusedadam import _core
from fusedadam.adapters import divides_by, flushes
from fusedadam.locks import new_lock
from fusedadam.signals import assignments, without_interruption
from fusedadam.torch.local import any_distributed, local_gradient, local_tensor
from fusedadam.torch.state import (
    ABSENT,
    NAMES,
    conform,
    new_average,
    new_plan,
    new_states,
    separate_counter,
)

if TYPE_CHECKING:
    from torch import Tensor

# Settings of a group beside torch's own, and what they are when off. A group has those that are on:
# torch's tools compare the keys of groups with those of torch's own optimizers.
_EXTRAS: Final[dict[str, Any]] = {
    "max_grad_norm": None,
    "ema_decay": None,
    "zero_grad_in_step": False,
}

# How a message of the kernel names a tensor.
_NAMED_TENSOR: Final = re.compile(rf"\b(?:params|grads|{'|'.join(NAMES.values())})\[(\d+)\]")


class FusedStep(torch.optim.Optimizer):
    """What `Adam` and `AdamW` add to torch's own classes, which keep settings and state."""

    _extras: Mapping[str, Any] = {}

    def _use_extras(self, **extras: Any) -> None:
        """Settings of groups that name none; to be called before torch's own `__init__`."""
        self._extras = extras
        _drop_what_is_off(extras)
        self._prepare()

    def _prepare(self) -> None:
        self._lock = new_lock()
        self._plan = new_plan()
        self._options: dict[int, tuple[tuple[Any, ...], _core.AdamOptions]] = {}
        self._swapped = False
        # All parameters, where all have state and in the order of `state`; and that state.
        self._known_params: list[Tensor] = []
        self._known_states: list[dict[str, Any]] = []
        self._known_averages: list[bool] = []
        self._known_distributed = False
        # Of each group the number of parameters; of each parameter the group.
        self._known_sizes: list[int] = []
        self._known_groups: list[int] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; those not named are the optimizer's.

        Raises
        ------
        TypeError, ValueError
            As torch's own; or a setting of fusedadam's is out of range or misspelt, or a parameter
            is there twice. The optimizer has not changed.
        """
        if isinstance(param_group, dict):
            params = param_group.get("params")
            if params is not None and not isinstance(params, (torch.Tensor, set)):
                param_group["params"] = list(params)
                _require_once(param_group["params"])
            _require_no_misspelt(param_group)
            for name, value in self._extras.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        _drop_what_is_off(param_group)
        try:
            self._options_of(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's own."""
        with self._lock:
            self._require_not_swapped()
            for group in self.param_groups:
                _drop_what_is_off(group)
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load settings and state, as torch's own. Settings that torch lacks may be missing."""
        self._require_not_swapped()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._require_not_swapped()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # For a pickle, and by load_state_dict with what may come from torch's own optimizer.
        groups_before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        _drop_what_is_off(self.defaults)
        self._extras = {name: self.defaults[name] for name in _EXTRAS if name in self.defaults}
        for index, group in enumerate(self.param_groups):
            extras = groups_before[index] if index < len(groups_before) else self._extras
            for name in _EXTRAS:
                group.setdefault(name, extras.get(name))
            # In a checkpoint of an earlier version they may be there though they are off.
            _drop_what_is_off(group)
        counters: set[int] = set()
        for param, own in self.state.items():
            if isinstance(param, torch.Tensor):
                conform(own, param)
                separate_counter(own, counters)
        self._prepare()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange parameters and their averages: before an evaluation, and after it once more.

        Until they are exchanged back, whatever steps, saves, loads or copies is refused.

        Raises
        ------
        ValueError
            There are no averages, or one does not fit its parameter. Nothing has changed.
        """
        with self._lock:
            # Those of the groups first, as a step counts them: a state may outlive its group.
            lists = [group["params"] for group in self.param_groups]
            params = dict.fromkeys(itertools.chain(*lists, self.state))
            pairs = {
                i: (local_tensor(param), local_tensor(self.state[param]["ema"]))
                for i, param in enumerate(params)
                if "ema" in self.state.get(param, ())
            }
            if not pairs:
                raise ValueError(
                    "swap_ema needs averages: ema_decay, and a step before it. Received: "
                    f"ema_decay={[group.get('ema_decay') for group in self.param_groups]!r}, "
                    f"state of {len(self.state)} parameters without an average"
                )
            for i, (param, average) in pairs.items():
                if (average.shape, average.dtype) != (param.shape, param.dtype):
                    error = ValueError(
                        f"ema[{i}] must have the shape and dtype of its parameter, "
                        f"{tuple(param.shape)} and {param.dtype}. "
                        f"Received: shape={tuple(average.shape)}, dtype={average.dtype}"
                    )
                    self._name_tensors(error)
                    raise error
            # Bytes for one of them at a time.
            most = max(param.nbytes for param, _ in pairs.values())
            scratch = torch.empty(most, dtype=torch.uint8, device="cpu")
            calls: list[Callable[[], object]] = []
            for param, average in pairs.values():
                kept = scratch[: param.nbytes].view(param.dtype).view(param.shape)
                calls += [
                    partial(kept.copy_, average),
                    partial(average.copy_, param),
                    partial(param.copy_, kept),
                ]
            without_interruption(*calls, *assignments(self, _swapped=not self._swapped))

    def _require_not_swapped(self) -> None:
        if self._swapped:
            raise ValueError(
                "the averages must be swapped out first: call swap_ema() again. "
                "Received: parameters that are swapped with their averages"
            )

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
        self._require_not_swapped()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists = [group["params"] for group in self.param_groups]
        sizes = list(map(len, lists))
        if sizes != self._known_sizes:
            self._known_groups = [i for i, size in enumerate(sizes) for _ in range(size)]
            self._known_sizes = sizes  # last: an interrupt may come in between
        try:
            self._step(list(itertools.chain(*lists)), self._known_groups, self._plan)
        except ValueError as error:
            self._name_tensors(error)
            raise
        return loss

    def _name_tensors(self, error: ValueError) -> None:
        names = itertools.chain(*(group.get("param_names", ()) for group in self.param_groups))
        name_tensors(error, list(names))

    @torch.no_grad()
    def _step(self, params: list[Tensor], groups: list[int], plan: _core.TensorPlan) -> None:
        """Step these parameters, each with the settings of its group."""
        with self._lock, contextlib.ExitStack() as undo:
            self._require_not_swapped()
            # Both are set by torch.amp.GradScaler: tensors, or the number 0 where it met no
            # gradient.
            found_inf = getattr(self, "found_inf", None)
            if found_inf is not None and float(found_inf):
                return
            grad_scale = getattr(self, "grad_scale", None)
            scale = None if grad_scale is None else float(grad_scale)
            # What the kernel cannot divide by, torch does, into copies.
            copy_scale = None if scale is None or divides_by(scale) else scale
            loss_scale = scale if copy_scale is None else None
            options = [self._options_of(i, loss_scale) for i in range(len(self.param_groups))]
            grads: list[Tensor | None] = _core.gradients_of(params)
            states = self._states(params, grads, groups, undo)
            known = states is self._known_states
            distributed = self._known_distributed if known else any_distributed(params)
            # No branch before `try`: CPython 3.11 leaves the start of such a block out of the `with`.
            used = grads if copy_scale is None else _divided(grads, copy_scale)
            try:
                stepped = _call(plan, params, used, states, groups, options, distributed)
            except ValueError:
                # Somebody gave a parameter or its state another layout: torch's steps allow that.
                changed = [conform(s, p) for s, p in zip(states, params, strict=True) if s]
                if not any(changed):
                    raise
                stepped = _call(plan, params, used, states, groups, options, distributed)
            undo.pop_all()
        torch.autograd.graph.increment_version(stepped)
        if scale is not None or any(option.zero_grad for option in options):
            _leave_gradients(grads, used, [options[group].zero_grad for group in groups], scale)

    def _states(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        groups: list[int],
        undo: contextlib.ExitStack,
    ) -> list[dict[str, Any]]:
        """The state of each parameter with a gradient, begun where there is none yet."""
        own = self.state
        averages = [group.get("ema_decay") is not None for group in self.param_groups]
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
            begun = new_states([params[i] for i in members], members, self._options_of(index))
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
        try:
            lr, (beta_1, beta_2) = float(group["lr"]), map(float, group["betas"])
        except (TypeError, ValueError):
            _require_valid(group, index)
            raise
        settings = {
            "lr": lr,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW)),
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
            "differentiable": group["differentiable"],
            **{name: group.get(name, off) for name, off in _EXTRAS.items()},
            "loss_scale": loss_scale,
        }
        key = tuple(settings.values())
        known = self._options.get(index)
        if known is None or known[0] != key:
            _drop_what_is_off(group)
            _require_valid(group, index)
            known = self._options[index] = key, _core_options(settings)
        return known[1]


def _steps(state: Mapping[str, Any]) -> float:
    return float(state.get("step") or 0)


def _forget_average(state: dict[str, Any], steps: float) -> None:
    if _steps(state) == steps:
        state.pop("ema", None)


# The greatest value of each number of a group, but betas.
_GREATEST: Final = {
    "lr": math.inf,
    "eps": math.inf,
    "weight_decay": math.inf,
    "max_grad_norm": math.inf,
    "ema_decay": 1.0,
}


def _require_valid(group: Mapping[str, Any], index: int) -> None:
    """Check the numbers of a group, under torch's names, and the flags that are not torch's."""
    rules: dict[str, str] = {}
    if group["differentiable"]:
        rules["differentiable"] = "must be False: autograd does not see into the step"
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        rules["betas"] = "must be two numbers"
        betas = ()
    values = {**group, **{f"betas[{i}]": beta for i, beta in enumerate(betas)}}
    for name in (*_GREATEST, *(f"betas[{i}]" for i in range(len(betas)))):
        if name not in values:
            continue
        if _is_no_number(values[name]):
            raise TypeError(
                f"{name} must be a real number. "
                f"Received: {name}={values[name]!r} in param_groups[{index}]"
            )
        number, greatest = float(values[name]), _GREATEST.get(name, 1.0)
        if name.startswith("betas") and not 0 <= number < 1:
            rules[name] = "must be >= 0 and < 1"
        elif not math.isfinite(number) or number > greatest or (number < 0 and name != "lr"):
            # Schedules may end with an lr below 0.
            limits = " and >= 0" if math.isinf(greatest) else f", >= 0 and <= {greatest:g}"
            rules[name] = "must be finite" + ("" if name == "lr" else limits)
    if group.get("zero_grad_in_step", False) not in (True, False):
        rules["zero_grad_in_step"] = "must be True or False"
    for name, rule in rules.items():
        raise ValueError(
            f"{name} {rule}. Received: {name}={values[name]!r} in param_groups[{index}]"
        )


def _is_no_number(value: Any) -> bool:
    # float() takes strings, and truth values as 0 and 1.
    return (
        isinstance(value, (str, bytes, bool))
        or not hasattr(value, "__float__")
        or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"
    )


def _core_options(settings: Mapping[str, Any]) -> _core.AdamOptions:
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


def _drop_what_is_off(settings: dict[str, Any]) -> None:
    """Take out settings of ours that are off, from a group or from the defaults."""
    for name, off in _EXTRAS.items():
        if name in settings and settings[name] in (None, off):
            del settings[name]


def _require_once(params: Sequence[Any]) -> None:
    """Refuse a parameter that is there twice; with or without a name."""
    first: dict[int, int] = {}
    for i, item in enumerate(params):
        param = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if id(param) in first:
            raise ValueError(
                "params must have each parameter once. "
                f"Received: params[{first[id(param)]}] again as params[{i}]"
            )
        first[id(param)] = i


def _require_no_misspelt(group: Mapping[str, Any]) -> None:
    """Refuse a key that is nearly one of ours: torch takes any, and nobody would look at it."""
    for key in group:
        for name in difflib.get_close_matches(str(key), _EXTRAS, 1, 0.85):
            if key != name:
                raise TypeError(
                    f"a group has no setting {key!r}. Did you mean {name!r}? "
                    f"Received: {key}={group[key]!r}"
                )


def name_tensors(error: Exception, names: Sequence[str]) -> None:
    """Add the names of parameters to what the message of an error calls by an index."""

    def named(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"{match[0]} ({names[index]!r})" if index < len(names) else match[0]

    if names:
        error.args = (_NAMED_TENSOR.sub(named, str(error)), *error.args[1:])


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


def _divided(grads: list[Tensor | None], scale: float) -> list[Tensor | None]:
    return [None if grad is None else grad / scale for grad in grads]


def _leave_gradients(
    grads: list[Tensor | None], used: list[Tensor | None], zeroed: list[bool], scale: float | None
) -> None:
    """Leave gradients unscaled, as torch's own fused step does, and tell of those zeroed."""
    for grad, copied, is_zeroed in zip(grads, used, zeroed, strict=True):
        if grad is None:
            continue
        if is_zeroed and copied is not grad:
            grad.zero_()
        elif is_zeroed:
            if grad.layout == torch.strided:
                torch.autograd.graph.increment_version(local_tensor(grad))
        elif scale is not None:
            grad.div_(scale)
