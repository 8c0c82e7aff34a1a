# SPDX-License-Identifier: MIT
"""What a run was measured on: the machine and its software."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

CPU = Path("/sys/devices/system/cpu/cpu0")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe_machine() -> dict[str, Any]:
    """Return the CPU, its caches, the memory and the operating system; what is unknown is None."""
    huge_pages = re.search(r"\[(.*)\]", read(HUGE_PAGES))
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cpus(),
        "hypervisor": "hypervisor" in read(Path("/proc/cpuinfo")),
        "l1d": cache("1", "Data"),
        "l2": cache("2", "Unified"),
        "l3": cache("3", "Unified"),
        "memory_gib": gib("MemTotal"),
        "huge_pages": huge_pages.group(1) if huge_pages else None,
        "governor": read(CPU / "cpufreq/scaling_governor").strip() or None,
        "os": operating_system(),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def describe_software(versions: dict[str, str]) -> dict[str, Any]:
    """Return versions: Python's, NumPy's, this library's build, and those given."""
    import fusedadam
    import numpy as np
    from fusedadam import _core

    return versions | {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fusedadam": {
            "version": fusedadam.__version__,
            "compiler": _core.compiler,
            "isa": fusedadam.active_isa(),
            "threading": _core.threading_runtime,
        },
    }


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Return the memory that programs could take now; where nothing tells, more than there is."""
    found = memory_kib("MemAvailable")
    return sys.maxsize if found is None else found * 1024


def memory_kib(field: str) -> int | None:
    """Return a number of /proc/meminfo, which Linux alone has."""
    found = re.search(rf"^{field}:\s+(\d+) kB", read(Path("/proc/meminfo")), re.MULTILINE)
    return int(found.group(1)) if found else None


def gib(field: str) -> float | None:
    """Return a number of /proc/meminfo in GiB."""
    found = memory_kib(field)
    return None if found is None else round(found / 2**20, 1)


def cpu_name() -> str:
    """Return the name that the CPU gives itself."""
    found = re.search(r"^model name\s*:\s*(.*)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def cache(level: str, kind: str) -> str | None:
    """Return the size of a cache of the first CPU, as Linux writes it: "1024K"."""
    for index in sorted((CPU / "cache").glob("index*")):
        if read(index / "level").strip() == level and read(index / "type").strip() == kind:
            return read(index / "size").strip()
    return None


def operating_system() -> str:
    """Return the name of the distribution, or else of the system."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(Path("/etc/os-release")), re.MULTILINE)
    return found.group(1) if found else platform.platform()


def read(path: Path) -> str:
    """Return the text of a file; "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
