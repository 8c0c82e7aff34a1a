# SPDX-License-Identifier: MIT
"""`python -m fusedadam`: print the information that a bug report needs."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from fusedadam import __version__, _core, active_isa, get_num_threads, supported_isas


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print versions, CPU and settings, one per line."""
    quota = _core.cpu_quota()
    facts = {
        "fusedadam": __version__,
        "compiler": _core.compiler,
        "instruction sets": ", ".join(supported_isas()),
        "active": active_isa(),
        "threads": get_num_threads(),
        "threading": _core.threading_runtime,
        "cpu": _cpu(),
        "cpu quota": "none" if quota is None else round(quota, 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for name, value in facts.items():
        print(f"{name:17}{value}")


if __name__ == "__main__":
    main()
