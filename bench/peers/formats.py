# SPDX-License-Identifier: MIT
"""The formats in which fusedadam stores weights and moments, as contenders of the benchmark."""

from __future__ import annotations

from typing import Any, NamedTuple

# In their order in tables.
ISAS = ("avx512", "avx2", "neon", "baseline")


class Format(NamedTuple):
    """The bytes of an element, and the optimizer's settings."""

    weights: int  # without low bits
    low_bits: int
    moments: int
    gradient: int
    settings: dict[str, Any]

    @property
    def held(self) -> int:
        """The bytes that an element occupies, with its gradient."""
        return self.weights + self.low_bits + self.moments + self.gradient

    @property
    def moved(self) -> int:
        """The bytes that a step reads and writes for an element. It only reads the gradient."""
        return 2 * self.held - self.gradient


FLOAT32 = "float32"
PACKED = "packed + int8"
FORMATS = {
    FLOAT32: Format(4, 0, 8, 4, {}),
    "bf16": Format(2, 0, 4, 2, {"moments": "bfloat16"}),
    "bf16 + int8": Format(2, 1, 4, 2, {"moments": "bfloat16", "low_bits": "int8"}),
    "bf16 + int16": Format(2, 2, 4, 2, {"moments": "bfloat16", "low_bits": "int16"}),
    PACKED: Format(2, 1, 2, 2, {"moments": "packed", "low_bits": "int8"}),
    "packed": Format(2, 0, 2, 2, {"moments": "packed"}),
    # The weight is float32, in two parts: its bfloat16 copy for the model, and the rest.
    "float32 + bf16 copy": Format(2, 2, 8, 2, {"moments": "float32", "low_bits": "int16"}),
}


def contender(format_name: str, isa: str) -> str:
    """Return the contender that steps a format on an instruction set."""
    return f"{format_name}, {isa}"


def parts_of(contender: str) -> tuple[str, str]:
    """Return the format and the instruction set of a contender; of a peer, its name and ""."""
    name, _, isa = contender.rpartition(", ")
    return (name, isa) if name in FORMATS else (contender, "")
