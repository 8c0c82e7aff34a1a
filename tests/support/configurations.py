# SPDX-License-Identifier: MIT
"""The options, storage formats and sizes with which steps are compared with the oracle."""

from __future__ import annotations

import itertools
from typing import Any

from helpers import halving
from training import ShapesAndDtypes

# Around vector widths (4 to 16 elements, groups of 64), chunks (256) and tiles (1,024).
SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 255, 256, 257, 1023, 1024, 1025, 2049, 4099)
# Several threads begin at 32,768 elements. This many are enough for three.
PARALLEL = 70_001

# Scalars, nothing, incomplete vectors and more than a tile, in both precisions.
MIXED: ShapesAndDtypes = [
    *(((3, 5), "float32"), ((), "float64"), ((2, 0, 3), "float32"), ((1023,), "float64")),
    *(((), "float32"), ((1025,), "float32"), ((9, 1, 33), "float64")),
]
LARGE: ShapesAndDtypes = [*MIXED, ((PARALLEL,), "float32"), ((7, 5_001), "float64")]
HALVES: ShapesAndDtypes = [
    *(((1,), "bfloat16"), ((3, 5, 7), "bfloat16"), ((1300,), "bfloat16")),
    *(((37,), "float32"), ((0, 2), "bfloat16")),
]
WITH_FLOAT16: ShapesAndDtypes = [*HALVES, ((130,), "float16"), ((), "float16")]

EVERYTHING: dict[str, Any] = {
    "amsgrad": True,
    "bias_corrected_epsilon": True,
    "weight_decay": 0.1,
    "l2": 0.2,
    "clipnorm_per_tensor": 0.5,
    "clipvalue": 0.01,
    "loss_scale": "dynamic",
    "use_ema": True,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
    "zero_grad": True,
    "maximize": True,
    "flush_denormals": False,
}
# The norm pass and the step pass must agree on these, however the tensors are divided.
TOGETHER: list[dict[str, Any]] = [
    {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "zero_grad": True},
    EVERYTHING,
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "beta_1": 0.5, "beta_2": 0.7, "epsilon": 1e-3, "decay": 2.0},
    {"lr": halving, "decay": 0.5, "weight_decay": 0.1},
    {"epsilon": 0.0},
    {"bias_corrected_epsilon": True, "epsilon": 1e-3},
    {"amsgrad": True, "beta_2": 0.5},
    {"weight_decay": 0.1, "decay": 0.5},
    {"weight_decay": 0.0},
    {"l2": 0.1},
    {"clipnorm": 0.5},
    {"clipnorm": 1e-30},
    {"clipnorm": 1e30, "clipvalue": 1e300},
    {"clipnorm": 0.0, "clipvalue": 0.0},
    {"clipvalue": 0.05},
    {"clipnorm_per_tensor": 1.0},
    {"clipnorm_per_tensor": 1e-30, "maximize": True},
    {"clipnorm_per_tensor": 0.0},
    {"use_ema": True},
    {"use_ema": True, "ema_momentum": 0.0},
    {"use_ema": True, "ema_momentum": 1.0},
    {"use_ema": True, "ema_momentum": 1 / 3, "ema_overwrite_frequency": 2},
    {"use_ema": True, "ema_overwrite_frequency": 1},
    {"loss_scale": 1.0},
    {"loss_scale": 2.0**-127},
    {"loss_scale": 2.0**127},
    {"loss_scale": 1 / 3, "clipnorm": 1.0},
    {"loss_scale": 100, "clipnorm_per_tensor": 0.01, "clipvalue": 0.005},
    {"loss_scale": "dynamic", "clipnorm": 1e-3},
    {"skip_nonfinite": True},
    {"gradient_accumulation_steps": 1},
    {"gradient_accumulation_steps": 3, "clipnorm": 0.5},
    {"gradient_accumulation_steps": 3, "loss_scale": 7.0, "clipnorm_per_tensor": 0.5},
    {"gradient_accumulation_steps": 2, "zero_grad": True, "skip_nonfinite": True},
    {"zero_grad": True},
    {"maximize": True, "clipnorm": 1.0, "clipvalue": 0.1},
    {"maximize": True, "l2": 0.1, "weight_decay": 0.1},
    {"flush_denormals": False, "clipnorm": 1e-38, "epsilon": 1e-20},
    *TOGETHER,
]

# Every combination of storage formats that is not refused.
FORMATS: list[dict[str, Any]] = [
    {"moments": moments, "low_bits": low_bits, "rounding": rounding}
    for moments, low_bits, rounding in itertools.product(
        ("float32", "bfloat16", "packed", "auto"),
        (None, "int8", "int16"),
        ("stochastic", "nearest"),
    )
    if rounding == "stochastic" or (moments != "packed" and low_bits != "int8")
]


def shapes_for(formats: dict[str, Any]) -> ShapesAndDtypes:
    """Tensors that can be stored in these formats."""
    return HALVES if formats.get("low_bits") else WITH_FLOAT16


def format_name(formats: dict[str, Any]) -> str:
    """A readable id of a test."""
    return "-".join(map(str, formats.values()))
