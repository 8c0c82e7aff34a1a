# SPDX-License-Identifier: MIT
"""`python -m fusedadam`: print what a bug report needs, check the bits, measure the speed."""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from fusedadam import __version__, _core, active_isa, get_num_threads, supported_isas
from fusedadam.bench import bench
from fusedadam.check import check


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report() -> None:
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
    for name in ("torch", "keras", "jax", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    for name, value in facts.items():
        print(f"{name:17}{value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    parser = argparse.ArgumentParser("python -m fusedadam", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    words = "compare the bits of steps with the published ones; 10 seconds"
    checks = commands.add_parser("check", help=words, description=words)
    isas, threads = supported_isas(), sorted({1, 2, get_num_threads()})
    checks.add_argument("--isa", nargs="+", choices=isas, default=isas)
    checks.add_argument("--threads", nargs="+", type=int, metavar="N", default=threads)
    words = "measure the speed of steps on this machine; 15 seconds"
    commands.add_parser("bench", help=words, description=words)
    args = parser.parse_args(argv)
    if args.command == "check":
        return int(not check(args.isa, args.threads))
    if args.command == "bench":
        bench()
    else:
        report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
