# SPDX-License-Identifier: MIT
"""The step of `Adam` and `AdamW`: from torch's groups and state to one call of the kernel."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from fusedadam import _core
from fusedadam.adapters import divides_by
from fusedadam.locks import new_lock
from fusedadam.signals import assignments, without_interruption
from fusedadam.torch.local import (
    any_distributed,
    local_gradient,
    local_tensor,
    mapped,
    part_of,
)
from fusedadam.torch.settings import (
    EXTRAS,
    PLAIN,
    core_options,
    drop_what_is_off,
    require_no_misspelt,
    require_valid,
)
from fusedadam.torch.state import (
    ABSENT,
    NAMES,
    Plan,
    conform,
    formats_of,
    joined,
    keep_tensors,
    needed_state,
    new_average,
    new_states,
    separate_counter,
    split_into,
    unwrap_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

# The names of tensors in the kernel's error messages.
_NAMED_TENSOR: Final = re.compile(rf"\b(?:params|grads|{'|'.join(NAMES.values())})\[(\d+)\]")


class FusedStep(torch.optim.Optimizer):
    """Mixin that `Adam` and `AdamW` add to torch's own classes, which keep settings and state."""

    _extras: Mapping[str, Any] = {}

    def _use_extras(self, **extras: Any) -> None:
        """Set the defaults of groups for `EXTRAS`; call before torch's own `__init__`."""
        self._extras = extras
        drop_what_is_off(extras)
        self._prepare()

    def _prepare(self) -> None:
        self._lock = new_lock()
        self._plan = Plan()
        self._options: dict[int, tuple[tuple[Any, ...], _core.AdamOptions]] = {}
        self._swapped = False
        self._averages: dict[int, Tensor] = {}  # of 16-bit parameters, while swapped
        # Cache for `_states`: the parameters and their states, if all have state in this order.
        self._known_params: list[Tensor] = []
        self._known_states: list[dict[str, Any]] = []
        self._known_averages: list[bool] = []
        self._known_distributed = False
        # Cache for `step`: the number of parameters of each group, and the group of each parameter.
        self._known_sizes: list[int] = []
        self._known_groups: list[int] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings; missing ones are those of the optimizer.

        Raises
        ------
        TypeError, ValueError
            As in torch; or a setting of fusedadam is out of range or misspelt, or a parameter
            occurs twice. The optimizer has not changed.
        """
        if isinstance(param_group, dict):
            params = param_group.get("params")
            if params is not None and not isinstance(params, (torch.Tensor, set)):
                param_group["params"] = list(params)
                _require_once(param_group["params"])
            require_no_misspelt(param_group)
            for name, value in self._extras.items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        drop_what_is_off(param_group)
        try:
            self._options_of(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as in torch; the state in the formats of the settings."""
        with self._lock:
            self._require_not_swapped()
            for group in self.param_groups:
                drop_what_is_off(group)
            self._conform_all()
            saved = super().state_dict()
            for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
                _set_seed(group, own)
            return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load settings and state, as in torch. Settings that torch lacks may be missing.

        State of `torch.optim.Adam` and `AdamW`, or in other formats than the settings ask for, is
        converted, rounded to nearest.
        """
        self._require_not_swapped()
        # torch casts state to the dtype of its parameter, which destroys integers.
        handle = self.register_load_state_dict_pre_hook(keep_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._require_not_swapped()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by pickle, and by load_state_dict, whose state may be of torch's own optimizer.
        groups_before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        drop_what_is_off(self.defaults)
        self._extras = {name: self.defaults[name] for name in EXTRAS if name in self.defaults}
        for index, group in enumerate(self.param_groups):
            extras = groups_before[index] if index < len(groups_before) else self._extras
            for name in EXTRAS:
                group.setdefault(name, extras.get(name))
            # Checkpoints of earlier versions may contain settings that are off.
            drop_what_is_off(group)
        self._prepare()
        counters: set[int] = set()
        for param, own in self.state.items():
            unwrap_tensors(own, param)
            if isinstance(param, torch.Tensor):
                separate_counter(own, counters)
        self._conform_all()

    def _conform_all(self) -> None:
        """Convert all state to the formats of its group, unless settings are out of range."""
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param not in self.state:
                    continue
                with contextlib.suppress(TypeError, ValueError):  # the next step reports it
                    needed = needed_state(param, self._options_of(index))
                    conform(self.state[param], param, needed)

    @torch.no_grad()
    def master_weights(self, param: Tensor) -> Tensor:
        """Return a parameter in float32 with its low bits: what the steps compute with.

        Parameters
        ----------
        param : torch.Tensor
            A parameter of this optimizer, of at most 32 bits.

        Returns
        -------
        torch.Tensor
            A copy in float32, for export or evaluation in full precision.

        Raises
        ------
        ValueError
            The averages are swapped in.
        TypeError
            The parameter has another dtype.
        """
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                "param must be float32, bfloat16 or float16: others have no weights of more bits. "
                f"Received: dtype={param.dtype}"
            )
        with self._lock:
            self._require_not_swapped()
            return cast("Tensor", mapped(joined, param, self.state.get(param, {}).get("low_bits")))

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Swap the parameters with their moving averages in place; a second call swaps them back.

        Use it to evaluate a model with the averages. Until they are swapped back, methods that
        step, save, load or copy raise an error.

        Raises
        ------
        ValueError
            There are no averages, or one does not fit its parameter. Nothing has changed.
        """
        with self._lock:
            self._swap_ema()

    def _swap_ema(self) -> None:
        # Parameters of groups come first, so that errors have the same positions as those of a
        # step. `state` may have entries of removed groups.
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
            dtype = torch.float32 if param.dtype.itemsize == 2 else param.dtype
            if (average.shape, average.dtype) != (param.shape, dtype):
                error = ValueError(
                    f"ema[{i}] must have the shape of its parameter, {tuple(param.shape)}, "
                    f"in {dtype}. "
                    f"Received: shape={tuple(average.shape)}, dtype={average.dtype}"
                )
                self._name_tensors(error)
                raise error
        # One buffer for all swaps, of the size of the largest parameter.
        most = max(param.nbytes for param, _ in pairs.values())
        scratch = torch.empty(most, dtype=torch.uint8, device="cpu")
        calls: list[Callable[[], object]] = []
        # A 16-bit weight has no room for its average, which is kept until it is swapped back.
        averages: dict[int, Tensor] = {}
        for i, (param, average) in pairs.items():
            if param.dtype.itemsize == 2:
                low = local_tensor(self.state[list(params)[i]].get("low_bits"))
                weights = joined(param, low)
                if not self._swapped:
                    averages[i] = average.clone()
                calls += [
                    partial(split_into, average, param, low),
                    partial(average.copy_, self._averages.get(i, weights)),
                ]
                continue
            kept = scratch[: param.nbytes].view(param.dtype).view(param.shape)
            calls += [
                partial(kept.copy_, average),
                partial(average.copy_, param),
                partial(param.copy_, kept),
            ]
        changes = {"_swapped": not self._swapped, "_averages": averages}
        without_interruption(*calls, *assignments(self, **changes))

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
            The result of `closure`; None without one.

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
            self._known_sizes = sizes  # set last, in case of an interrupt
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
    def _step(self, params: list[Tensor], groups: list[int], plan: Plan) -> None:
        """Step these parameters, each with the settings of its group."""
        with self._lock, contextlib.ExitStack() as undo:
            self._require_not_swapped()
            # torch.amp.GradScaler sets both attributes, to tensors, or to 0 without any gradient.
            found_inf = getattr(self, "found_inf", None)
            if found_inf is not None and float(found_inf):
                return
            grad_scale = getattr(self, "grad_scale", None)
            scale = None if grad_scale is None else float(grad_scale)
            # If the kernel does not support this scale, torch divides copies of the gradients.
            copy_scale = None if scale is None or divides_by(scale) else scale
            loss_scale = scale if copy_scale is None else None
            options = [self._options_of(i, loss_scale) for i in range(len(self.param_groups))]
            grads: list[Tensor | None] = _core.gradients_of(params)
            states = self._states(params, grads, groups, undo)
            known = states is self._known_states
            distributed = self._known_distributed if known else any_distributed(params)
            # No branch before `try`: CPython 3.11 would then leave its start outside of the `with`.
            used = grads if copy_scale is None else _divided(grads, copy_scale)
            known_options = plan.knows(options)
            try:
                if not known_options and plan.formats != formats_of(options):
                    self._conform_for(params, states, groups, options, undo)
                stepped = _call(plan.core, params, used, states, groups, options, distributed)
            except ValueError:
                # As in torch, the strides of a parameter or its state may change between steps.
                if not self._conform_for(params, states, groups, options, undo):
                    raise
                stepped = _call(plan.core, params, used, states, groups, options, distributed)
            undo.pop_all()
            if not known_options:
                plan.took(options)
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
        """Return the state of each parameter with a gradient, initialized if missing."""
        own = self.state
        averages = [group.get("ema_decay") is not None for group in self.param_groups]
        # Use the cache: looking up tensors in a dict calls Tensor.__hash__, which is slow.
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
                # The state is of an optimizer without averages.
                undo.callback(_forget_average, state, _steps(state))
                state["ema"] = new_average(params[i], state.get("low_bits"))
        if len(own) == len(params) and _core.same_objects(list(own), params):
            self._known_distributed = any_distributed(params)
            self._known_averages = averages
            self._known_params, self._known_states = params, states
        return states

    def _conform_for(
        self,
        params: list[Tensor],
        states: list[dict[str, Any]],
        groups: list[int],
        options: list[_core.AdamOptions],
        undo: contextlib.ExitStack,
    ) -> bool:
        """Conform the states of these parameters; return whether any has changed."""
        present = [i for i, state in enumerate(states) if state is not ABSENT]
        needed = {i: needed_state(params[i], options[groups[i]], f"params[{i}]") for i in present}
        changed = False
        for i in present:
            state, param = states[i], params[i]
            converted, low_bits = dict(state), state.get("low_bits")
            if low_bits is not None and low_bits.dtype != needed[i].get("low_bits"):
                undo.callback(_put_back, state, dict(state), _steps(state), param, param.clone())
            if conform(converted, param, needed[i]):
                undo.callback(_put_back, state, dict(state), _steps(state), param, None)
                state.clear()
                state.update(converted)
                changed = True
        return changed

    def _begin(
        self,
        params: list[Tensor],
        groups: list[int],
        positions: list[int],
        undo: contextlib.ExitStack,
    ) -> None:
        """Initialize the state of the parameters at these positions, one group at a time."""
        by_group: dict[int, list[int]] = {}
        for i in positions:
            by_group.setdefault(groups[i], []).append(i)
            undo.callback(self._forget_unless_stepped, params[i])
        for index, members in by_group.items():
            begun = new_states([params[i] for i in members], members, self._options_of(index))
            for i, state in zip(members, begun, strict=True):
                self.state[params[i]].update(state)

    def _adopt(self, params: list[Tensor], groups: list[int]) -> None:
        """Give parameters whose dtype has changed state in the formats of their groups."""
        with self._lock, contextlib.ExitStack() as undo:
            self._begin(params, groups, self._without_state(params), undo)
            for param, group in zip(params, groups, strict=True):
                conform(self.state[param], param, needed_state(param, self._options_of(group)))
            undo.pop_all()

    def _without_state(self, params: Iterable[Tensor]) -> list[int]:
        return [i for i, param in enumerate(params) if not self.state.get(param)]

    def _forget_known(self) -> None:
        """Drop the cache, since some of the state may be removed again."""
        self._known_params, self._known_states = [], []

    def _forget_unless_stepped(self, param: Tensor) -> None:
        """Remove the new state of a parameter, unless it was stepped before an interrupt."""
        if not _steps(self.state.get(param, {})):
            self.state.pop(param, None)

    # ---- settings

    def _options_of(self, index: int, loss_scale: float | None = None) -> _core.AdamOptions:
        """Return the settings of a group as options of the kernel."""
        group = self.param_groups[index]
        try:
            lr, (beta_1, beta_2) = float(group["lr"]), map(float, group["betas"])
        except (TypeError, ValueError):
            require_valid(group, index)
            raise
        # Read in each step: a dict of all settings would take a twelfth of a small step.
        get = group.get
        key = (
            *(lr, beta_1, beta_2, loss_scale, get("decoupled_weight_decay")),
            *map(get, PLAIN),
            *map(get, EXTRAS),
        )
        known = self._options.get(index)
        if known is None or known[0] != key:
            drop_what_is_off(group)
            require_valid(group, index)
            decoupled = group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
            settings = {
                **EXTRAS,
                **group,
                "lr": lr,
                "betas": (beta_1, beta_2),
                "decoupled_weight_decay": decoupled,
            }
            known = self._options[index] = key, core_options(settings, loss_scale)
        return known[1]


def _put_back(
    state: dict[str, Any],
    before: dict[str, Any],
    steps: float,
    param: Tensor,
    weights: Tensor | None,
) -> None:
    """Undo a change of formats, unless the parameter was stepped before an interrupt."""
    if _steps(state) > steps:
        return
    state.clear()
    state.update(before)
    if weights is not None:
        param.copy_(weights)


def _steps(state: Mapping[str, Any]) -> float:
    return float(state.get("step") or 0)


def _forget_average(state: dict[str, Any], steps: float) -> None:
    if not _steps(state) > steps:  # also if the count is NaN
        state.pop("ema", None)


def _require_once(params: Sequence[Any]) -> None:
    """Raise if a parameter, named or not, occurs twice."""
    first: dict[int, int] = {}
    for i, item in enumerate(params):
        param = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if id(param) in first:
            raise ValueError(
                "params must contain each parameter once. "
                f"Received: params[{first[id(param)]}] again as params[{i}]"
            )
        first[id(param)] = i


def groups_of(model: torch.nn.Module, optimizer: FusedStep) -> dict[Tensor, int]:
    """Return the index of the group of each parameter of an optimizer; raise if it is another one."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            "optimizer must be a fusedadam.torch.Adam or AdamW. "
            f"Received: {type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    return {
        param: index
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    }


def name_tensors(error: Exception, names: Sequence[str]) -> None:
    """Add parameter names to the indices in an error message."""

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
    """Call the kernel, and return the tensors that it has modified."""
    parts = None
    if distributed:
        if any(option.clipnorm for option in options):
            raise ValueError(
                "max_grad_norm must be None for DTensors, whose norm spans several processes: use "
                "torch.nn.utils.clip_grad_norm_. Received: "
                f"max_grad_norm={max(option.clipnorm or 0 for option in options)!r}"
            )
        grads = [
            None if grad is None else local_gradient(grad, param)
            for grad, param in zip(grads, params, strict=True)
        ]
        if any(map(_is_stored, params)) or any(option.moments != "auto" for option in options):
            parts = [part_of(p) if any_distributed([p]) else None for p in params]
        params = [local_tensor(param) for param in params]
        states = [{k: local_tensor(value) for k, value in state.items()} for state in states]
    stepped = plan.step_counted(params, grads, states, groups, options, parts)
    if stepped == len(params):
        return params
    return [param for param, grad in zip(params, grads, strict=True) if grad is not None]


def _set_seed(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Add the default seed to a saved group whose bits depend on it."""
    if any(map(_is_stored, own["params"])) or own.get("moments", "auto") != "auto":
        group.setdefault("seed", 0)


def _is_stored(param: Tensor) -> bool:
    return param.dtype.itemsize == 2


def _divided(grads: list[Tensor | None], scale: float) -> list[Tensor | None]:
    return [None if grad is None else grad / scale for grad in grads]


def _leave_gradients(
    grads: list[Tensor | None], used: list[Tensor | None], zeroed: list[bool], scale: float | None
) -> None:
    """Unscale gradients in place, as torch's fused step does, or mark them as zeroed."""
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
