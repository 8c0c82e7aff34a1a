# SPDX-License-Identifier: MIT
"""Locates, and if necessary builds, the library of the traffic twin."""

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
    """Return the path from the environment, or else build the library.

    Return "" if the build fails. The contender that needs the library then raises an error.
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
    """Build a release with CMake, like the wheel. Compiler messages go to standard error."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = ["-S", str(SOURCE), "-B", str(BUILD), "-DFUSEDADAM_TWIN=ON"]
    compile_ = ["--build", str(BUILD), "--config", "Release", "--target", "traffic_twin", "-j2"]
    for arguments in (configure, compile_):
        subprocess.run([cmake, *arguments], check=True, stdout=subprocess.DEVNULL)
