# SPDX-License-Identifier: MIT
"""`AdamW8bit` of `bitsandbytes-cpu-fork`, which calls its import package `bitsandbytes` too.

So it is installed in a directory of its own, which only the process of this contender sees:

    pip install --no-deps --target bench/apart/bitsandbytes-cpu-fork bitsandbytes-cpu-fork

https://pypi.org/project/bitsandbytes-cpu-fork
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from peers import Contender, Work, bitsandbytes_adam
from peers.torch_adam import limit

__all__ = ["limit", "make", "versions"]

PACKAGE = "bitsandbytes-cpu-fork"
DIRECTORY = Path(__file__).parents[1] / "apart" / PACKAGE


def versions() -> dict[str, str]:
    """Import the package from its directory, and return the versions."""
    if not DIRECTORY.exists():
        raise ModuleNotFoundError(f"nothing in bench/apart/{PACKAGE}; docs/benchmarks.md says why")
    sys.path.insert(0, str(DIRECTORY))
    # Its documentation: the library for AVX-512 in the wheels for older systems has no threads.
    os.environ.setdefault("BNB_CPU_DISABLE_AVX512", "1")
    found = bitsandbytes_adam.versions()
    return {PACKAGE: found.pop("bitsandbytes"), **found}


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    return bitsandbytes_adam.make(names, work, threads)
