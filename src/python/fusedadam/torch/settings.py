# SPDX-License-Identifier: MIT
"""The settings of torch's groups: those that torch lacks, their rules, and the kernel's options."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Final

from fusedadam import _core
from fusedadam.adapters import flushes

# Settings that torch lacks, and their values when off. Groups contain only those that are on,
# because torch's tools compare the keys of groups with those of torch's own optimizers.
EXTRAS: Final[dict[str, Any]] = {
    "max_grad_norm": None,
    "ema_decay": None,
    "zero_grad_in_step": False,
    "moments": "auto",
    "low_bits": None,
    "rounding": "stochastic",
    "seed": 0,
}

# Settings of torch that the step reads as they are; beside them, lr and betas.
PLAIN: Final = ("eps", "weight_decay", "amsgrad", "maximize", "differentiable")

# The maximum of each numeric setting of a group, except betas.
_GREATEST: Final = {
    "lr": math.inf,
    "eps": math.inf,
    "weight_decay": math.inf,
    "max_grad_norm": math.inf,
    "ema_decay": 1.0,
}


def require_valid(group: Mapping[str, Any], index: int) -> None:
    """Check the numeric settings of a group and the flags that torch does not check."""
    rules: dict[str, str] = {}
    if group["differentiable"]:
        rules["differentiable"] = "must be False: autograd cannot differentiate through the step"
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
            # Schedulers may end with lr < 0.
            limits = " and >= 0" if math.isinf(greatest) else f", >= 0 and <= {greatest:g}"
            rules[name] = "must be finite" + ("" if name == "lr" else limits)
    if group.get("zero_grad_in_step", False) not in (True, False):
        rules["zero_grad_in_step"] = "must be True or False"
    for name, rule in rules.items():
        raise ValueError(
            f"{name} {rule}. Received: {name}={values[name]!r} in param_groups[{index}]"
        )


def _is_no_number(value: Any) -> bool:
    # float() also accepts strings and booleans.
    return (
        isinstance(value, (str, bytes, bool))
        or not hasattr(value, "__float__")
        or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"
    )


def core_options(settings: Mapping[str, Any], loss_scale: float | None) -> _core.AdamOptions:
    """Return the settings of a group, with all of `EXTRAS`, as options of the kernel."""
    beta_1, beta_2 = settings["betas"]
    ema_decay = settings["ema_decay"]
    decay = "weight_decay" if settings["decoupled_weight_decay"] else "l2"
    return _core.AdamOptions(
        {
            "lr": settings["lr"],
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": float(settings["eps"]),
            "bias_corrected_epsilon": True,
            decay: float(settings["weight_decay"]),
            "amsgrad": bool(settings["amsgrad"]),
            "maximize": bool(settings["maximize"]),
            "clipnorm": settings["max_grad_norm"],
            "use_ema": ema_decay is not None,
            **({} if ema_decay is None else {"ema_momentum": ema_decay}),
            "zero_grad": bool(settings["zero_grad_in_step"]),
            "loss_scale": loss_scale,
            "flush_denormals": flushes(settings["eps"]),
            **{name: settings[name] for name in ("moments", "low_bits", "rounding", "seed")},
        }
    )


def drop_what_is_off(settings: dict[str, Any]) -> None:
    """Delete `EXTRAS` that are off from a group or from the defaults."""
    for name, off in EXTRAS.items():
        if name in settings and settings[name] in (None, off):
            del settings[name]


def require_no_misspelt(group: Mapping[str, Any]) -> None:
    """Raise if a key is nearly one of `EXTRAS`: torch would accept and ignore it."""
    for key in group:
        for name in difflib.get_close_matches(str(key), EXTRAS, 1, 0.85):
            if key != name:
                raise TypeError(
                    f"a group has no setting {key!r}. Did you mean {name!r}? "
                    f"Received: {key}={group[key]!r}"
                )
