# SPDX-License-Identifier: MIT
"""A description of the machine and software of a run, and the memory of a process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

CPU = Path("/sys/devices/system/cpu/cpu0")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Writing 5 to it counts the peak anew. Only Linux has it.
RESET_PEAK = Path("/proc/self/clear_refs")
# Left to other programs.
SPARE_BYTES = 1 << 30


def describe_machine() -> dict[str, str]:
    """Return CPU, caches, memory and operating system, without what is unknown."""
    caches = {
        f"L{read(index / 'level').strip()}": read(index / "size").strip()
        for index in sorted((CPU / "cache").glob("index*"))
        if read(index / "type").strip() != "Instruction"
    }
    found = {
        "CPU": cpu_name(),
        "cores": str(usable_cpus()),
        "hypervisor": "yes" if "hypervisor" in read(Path("/proc/cpuinfo")) else "no",
        **caches,
        "memory": f"{memory_bytes('MemTotal') / 2**30:.1f} GiB",
        "huge pages": match(r"\[(.*)\]", HUGE_PAGES),
        "OS": match(r'^PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release")) or platform.platform(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return {name: value for name, value in found.items() if value}


def describe_software(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages, of Python, and of this build of fusedadam."""
    import fusedadam
    from fusedadam import _core

    distributions = metadata.packages_distributions()
    versions = {name: metadata.version(distributions[name][0]) for name in packages}
    build = (fusedadam.__version__, _core.compiler, fusedadam.active_isa(), _core.threading_runtime)
    return {**versions, "fusedadam": ", ".join(build), "Python": platform.python_version()}


def cpu_name() -> str:
    """Return the model name of the CPU."""
    return match(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo")) or platform.machine()


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(field: str) -> int:
    """Return a field of /proc/meminfo in bytes; more than enough where there is none."""
    return 1024 * int(match(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo")) or sys.maxsize >> 10)


def too_large(needed: float) -> str:
    """Return why there is not so much memory, or ""."""
    enough = needed + SPARE_BYTES <= memory_bytes("MemAvailable")
    return "" if enough else f"memory: needs {(needed + SPARE_BYTES) / 2**30:.1f} GiB"


def process_bytes(field: str) -> int:
    """Return a memory size of this process: VmRSS now, or VmHWM at its peak."""
    return 1024 * int(match(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status")) or 0)


def baseline_bytes() -> int:
    """Return the memory of this process without garbage, and count its peak anew."""
    collect()
    RESET_PEAK.write_text("5")
    return process_bytes("VmRSS")


def collect() -> None:
    """Collect reference cycles, and return free heap memory to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def match(pattern: str, path: Path) -> str:
    """Return the first group of a pattern in a file, or ""."""
    found = re.search(pattern, read(path), re.MULTILINE)
    return found.group(1) if found else ""


def read(path: Path) -> str:
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
