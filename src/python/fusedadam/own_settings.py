# SPDX-License-Identifier: MIT
"""Settings that some parameters have of their own, in place of the optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fusedadam._core import AdamOptions
from fusedadam.schedules import either_name, require_not_negative

# They decide which arrays the state has.
STRUCTURAL: Final = ("amsgrad", "use_ema", "gradient_accumulation_steps")

# They cannot differ between parameters.
_OF_THE_STEP: Final = (*STRUCTURAL, "loss_scale", "skip_nonfinite", "zero_grad")

_ABSENT: Final = object()


def checked_override(options: AdamOptions, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a parameter's own as plain numbers.

    Parameters
    ----------
    options : AdamOptions
        Those of the optimizer.
    settings : dict
        By their names as arguments of `Adam`.

    Raises
    ------
    TypeError, ValueError
        A setting is unknown, of a wrong type or out of range, or concerns the step as a whole.
    """
    settings = dict(settings)
    if "learning_rate" in settings:
        learning_rate = settings.pop("learning_rate")
        settings["lr"] = either_name(settings.get("lr", _ABSENT), learning_rate, absent=_ABSENT)
    if callable(settings.get("lr")):
        raise TypeError(
            "lr must be a number: a schedule is that of the optimizer. Call override again to "
            f"change it. Received: lr={settings['lr']!r}"
        )
    for name in _OF_THE_STEP:
        if name in settings:
            raise ValueError(
                f"{name} concerns the step as a whole: set it for the optimizer. "
                f"Received: {name}={settings[name]!r}"
            )
    checked = require_not_negative(options.changed(settings))
    return {name: getattr(checked, name) for name in settings}


def grouped(overrides: Mapping[int, Mapping[str, Any]]) -> list[tuple[list[int], dict[str, Any]]]:
    """Return the positions that share settings, and these settings."""
    groups: list[tuple[list[int], dict[str, Any]]] = []
    for position, settings in overrides.items():
        for positions, same in groups:
            if same == settings:
                positions.append(position)
                break
        else:
            groups.append(([position], dict(settings)))
    return groups
