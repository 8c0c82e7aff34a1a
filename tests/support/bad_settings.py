# SPDX-License-Identifier: MIT
"""Values that a setting must refuse, with what the message says, for the table of faults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Errors: TypeAlias = "type[BaseException] | tuple[type[BaseException], ...]"

HUGE = 10**400  # beyond float64, which must not raise OverflowError


def whole(*words: str, received: str = ".+") -> str:
    """A pattern for a message with all of these words in any order, then the received value."""
    return "".join(f"(?=.*{word})" for word in words) + f".*[Rr]eceived: {received}"


class BadValue(NamedTuple):
    name: str
    value: Any
    errors: Errors
    pattern: str

    def __str__(self) -> str:
        return f"{self.name}={'10**400' if self.value is HUGE else repr(self.value):.23}"


NOT_FINITE = (math.nan, math.inf, -math.inf, np.float32("nan"))
NEGATIVE = (-1.0, -1, -1e-300, -5e-324)
BEYOND = (2.0**-127 * (1 - 2**-53), 2.0**127 * (1 + 2**-52))  # the range of loss_scale
# float() accepts most of these, some with a warning.
NOT_NUMBERS: tuple[Any, ...] = (
    *("0.5", np.str_("0.5"), [0.5], (0.5,), {}, 0.5j, object(), np.array([0.5, 0.5])),
    *(np.array([0.5]), True, np.True_, np.array(True), np.array(True, dtype=object)),
    *(np.timedelta64(1, "s"), np.array("0.5"), np.array(b"0.5"), np.complex64(0.5), np.array(0.5j)),
)
NOT_INTEGERS = (1.5, 2.0, "2", [2], math.nan, True, np.True_, np.array([2]), np.array(2.0))
NOT_SWITCHES: tuple[Any, ...] = (
    *("yes", 0.5, None, [], 1, 0, np.int64(1), np.array([True]), np.array("True")),
)
COUNTS = "ema_overwrite_frequency gradient_accumulation_steps"
REALS = "learning_rate beta_1 beta_2 epsilon decay l2 weight_decay clipvalue ema_momentum"
SWITCHES = "bias_corrected_epsilon use_ema skip_nonfinite zero_grad maximize flush_denormals"
CLIPS = "clipnorm clipnorm_per_tensor clipvalue"

# Names of settings, values, errors, and what the message says. All values are for one name of each
# type, since the names of a type share its conversion; the limits are for every name.
ROWS: list[tuple[str, Iterable[Any], Errors, str]] = [
    ("lr learning_rate epsilon decay l2", NEGATIVE + NOT_FINITE, ValueError, "finite"),
    ("weight_decay", NEGATIVE + NOT_FINITE, ValueError, "finite and >= 0"),
    (CLIPS, (math.nan, math.inf, np.float32("nan")), ValueError, "finite and >= 0"),
    (CLIPS, (-math.inf, *NEGATIVE), ValueError, "Keras"),
    ("beta_1 beta_2", (*NOT_FINITE, -0.5, -5e-324, 1.0, 1, 1.5), ValueError, ">= 0 and < 1"),
    ("ema_momentum", (*NOT_FINITE, -0.5, -5e-324, 1 + 2**-52, 2), ValueError, ">= 0 and <= 1"),
    ("loss_scale", (*NOT_FINITE, 0, -1.0, *BEYOND), ValueError, r">= 2\*\*-127 and <= 2\*\*127"),
    ("loss_scale", ("static", "", "Dynamic", "\ud800"), ValueError, "a number or 'dynamic'"),
    (f"lr {REALS} clipnorm loss_scale", (HUGE,), ValueError, "range of float64"),
    ("lr clipnorm", NOT_NUMBERS, TypeError, "real number"),
    ("loss_scale", NOT_NUMBERS[2:], TypeError, "real number"),
    (f"{REALS} clipnorm_per_tensor", ("0.5", True, 0.5j), TypeError, "real number"),
    ("lr beta_1 beta_2 decay l2 ema_momentum", (None,), TypeError, "real number"),
    ("amsgrad", NOT_SWITCHES, TypeError, "True or False"),
    (SWITCHES, ("yes", 1, 0, None), TypeError, "True or False"),
    (COUNTS, (0, -1, -(2**63), np.int64(0)), ValueError, ">= 1"),
    (f"{COUNTS} seed", (2**63, 2**64, HUGE), ValueError, "range of int64"),
    (COUNTS, NOT_INTEGERS, TypeError, "an integer"),
    ("seed", (-1, -(2**63)), ValueError, ">= 0"),
    ("seed", (0.5, True, None, "0"), TypeError, "an integer"),
    ("moments", ("float16", "", None, 16, True), ValueError, "'packed' or 'auto'"),
    ("low_bits", ("int32", "None", 8, 0, False), ValueError, "None, 'int8' or 'int16'"),
    ("rounding", ("up", None, 0, True), ValueError, "'stochastic' or 'nearest'"),
]


def _bad_value(name: str, value: Any, errors: Errors, says: str) -> BadValue:
    shown = "lr" if name == "learning_rate" else name
    if says == "Keras":
        text = rf"Expected {name} >= 0, received: {re.escape(repr(float(value)))}"
        return BadValue(name, value, errors, text)
    received = rf"{shown}\b.*"
    if errors is ValueError and isinstance(value, float):
        received = re.escape(f"{shown}={float(value)!r}")
    return BadValue(name, value, errors, whole(rf"\b{shown}\b", says, received=received))


BAD_VALUES = [
    _bad_value(name, value, errors, says)
    for names, values, errors, says in ROWS
    for name in names.split()
    for value in values
]
