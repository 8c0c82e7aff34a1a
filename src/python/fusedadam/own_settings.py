# SPDX-License-Identifier: MIT
"""Settings of single parameters, which override those of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fusedadam._core import AdamOptions
from fusedadam.schedules import either_name, require_not_negative

# Settings that determine which arrays the state has.
STRUCTURAL: Final = ("amsgrad", "use_ema", "gradient_accumulation_steps", "moments", "low_bits")

# Settings that cannot differ between parameters.
_OF_THE_STEP: Final = (*STRUCTURAL, "loss_scale", "skip_nonfinite", "zero_grad")

_ABSENT: Final = object()


def checked_override(options: AdamOptions, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `Optimizer.override` as plain numbers, checked with `options`."""
    settings = dict(settings)
    if "learning_rate" in settings:
        learning_rate = settings.pop("learning_rate")
        settings["lr"] = either_name(settings.get("lr", _ABSENT), learning_rate, absent=_ABSENT)
    if callable(settings.get("lr")):
        raise TypeError(
            "lr must be a number: only the optimizer can have a schedule. To change this lr later, "
            f"call override again. Received: lr={settings['lr']!r}"
        )
    for name in _OF_THE_STEP:
        if name in settings:
            raise ValueError(
                f"{name} concerns the step as a whole: set it on the optimizer. "
                f"Received: {name}={settings[name]!r}"
            )
    checked = require_not_negative(options.changed(settings))
    return {name: getattr(checked, name) for name in settings}


def grouped(overrides: Mapping[int, Mapping[str, Any]]) -> list[tuple[list[int], dict[str, Any]]]:
    """Group positions with equal settings: return (positions, settings) for each group."""
    groups: list[tuple[list[int], dict[str, Any]]] = []
    for position, settings in overrides.items():
        for positions, same in groups:
            if same == settings:
                positions.append(position)
                break
        else:
            groups.append(([position], dict(settings)))
    return groups
