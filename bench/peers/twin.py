# SPDX-License-Identifier: MIT
"""The library of the traffic twin: where it is, and how it gets there."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARY_VARIABLE = "FUSEDADAM_TWIN_LIBRARY"
SOURCE = Path(__file__).resolve().parents[2]
BUILD = SOURCE / "build" / "bench-twin"


@functools.cache
def library_path() -> str:
    """Return the path that the environment names, or else build the library.

    What went wrong in building is told by the contender that needs it: "" is no path.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        return given
    try:
        build()
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = sorted(BUILD.glob("bench/**/*traffic_twin.*"))
    libraries = [path for path in found if path.suffix in {".so", ".dylib", ".dll"}]
    return str(libraries[0]) if libraries else ""


def build() -> None:
    """Build it with CMake, a release as the wheel is one; the compiler's complaints go to stderr."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = ["-S", str(SOURCE), "-B", str(BUILD), "-DFUSEDADAM_TWIN=ON"]
    compile_ = ["--build", str(BUILD), "--config", "Release", "--target", "traffic_twin", "-j2"]
    for arguments in (configure, compile_):
        subprocess.run([cmake, *arguments], check=True, stdout=subprocess.DEVNULL)
