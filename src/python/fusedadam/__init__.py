# SPDX-License-Identifier: MIT
"""Fused, in-place Adam on the CPU, with bitwise identical results on every machine."""

from __future__ import annotations

try:
    from fusedadam._core import (
        __version__,
        active_isa,
        get_num_threads,
        set_isa,
        set_num_threads,
        supported_isas,
    )
except ModuleNotFoundError as error:
    if error.name == "fusedadam._core":
        message = (
            "the compiled part of fusedadam is missing: install the package (pip install .) "
            "and import it from outside its source tree"
        )
        raise ImportError(message) from error
    raise

from fusedadam.adam import Adam, adam_step
from fusedadam.norm import global_norm
from fusedadam.optimizer import Optimizer

__all__ = [
    "Adam",
    "Optimizer",
    "__version__",
    "active_isa",
    "adam_step",
    "get_num_threads",
    "global_norm",
    "set_isa",
    "set_num_threads",
    "supported_isas",
]
