# SPDX-License-Identifier: MIT
"""A description of the machine and software of a run."""

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
    """Return CPU, caches, memory and operating system. Unknown values are None."""
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
    """Return the given versions, and those of Python, NumPy and this build of fusedadam."""
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
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Return the available memory in bytes, or `sys.maxsize` if it is unknown."""
    found = memory_kib("MemAvailable")
    return sys.maxsize if found is None else found * 1024


def memory_kib(field: str) -> int | None:
    """Return a field of /proc/meminfo in KiB, or None if there is none (only Linux has it)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", read(Path("/proc/meminfo")), re.MULTILINE)
    return int(found.group(1)) if found else None


def gib(field: str) -> float | None:
    """Return a field of /proc/meminfo in GiB, or None if there is none."""
    found = memory_kib(field)
    return None if found is None else round(found / 2**20, 1)


def cpu_name() -> str:
    """Return the model name of the CPU."""
    found = re.search(r"^model name\s*:\s*(.*)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def cache(level: str, kind: str) -> str | None:
    """Return the size of a cache of the first CPU in Linux's notation, such as "1024K"."""
    for index in sorted((CPU / "cache").glob("index*")):
        if read(index / "level").strip() == level and read(index / "type").strip() == kind:
            return read(index / "size").strip()
    return None


def operating_system() -> str:
    """Return the name of the Linux distribution, or else of the platform."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(Path("/etc/os-release")), re.MULTILINE)
    return found.group(1) if found else platform.platform()


def read(path: Path) -> str:
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
