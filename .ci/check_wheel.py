# SPDX-License-Identifier: MIT
"""Check a repaired wheel: it has the module, its type stubs and libgomp, and nothing else.

Also checks that the module was built with the hardening flags. Needs readelf.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elf_hardening import any_library_problems, module_problems

REQUIRED = {
    "extension module": r"fusedadam/_core\..*\.so",
    "type stubs of the extension module": r"fusedadam/_core\.pyi",
    "marker for type checkers": r"fusedadam/py\.typed",
    "OpenMP runtime": r"fusedadam\.libs/libgomp-.*\.so\..*",
    "license": r"fusedadam-.*\.dist-info/licenses/LICENSE",
}
# Headers, CMake files and the static library belong to the C++ package. Other shared libraries
# belong to the system (manylinux guarantees libstdc++ and libc).
ALLOWED = [
    *REQUIRED.values(),
    r"fusedadam/[a-z_/]+\.py",
    r"fusedadam-.*\.dist-info/.*",
]


def problems(wheel: Path) -> list[str]:
    """Return the problems of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    found = [
        f"lacks the {what} ({pattern})"
        for what, pattern in REQUIRED.items()
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    found += [
        f"carries {name}"
        for name in names
        if not any(re.fullmatch(pattern, name) for pattern in ALLOWED)
    ]
    if "manylinux" not in wheel.name:
        found.append("has no manylinux tag")
    return found + list(library_problems(wheel))


def library_problems(wheel: Path) -> Iterator[str]:
    """Yield the problems of the shared libraries of a wheel."""
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".so" not in Path(name).suffixes:
                continue
            path = Path(archive.extract(name, directory))
            found = list(any_library_problems(path))
            if re.fullmatch(REQUIRED["extension module"], name):
                found += module_problems(path, "PyInit__core")
            yield from (f"has {name}, which: {problem}" for problem in found)


def main() -> int:
    """Check the given wheels; return 1 if one has problems."""
    failed = not sys.argv[1:]
    for argument in sys.argv[1:]:
        wheel = Path(argument)
        for problem in problems(wheel):
            failed = True
            print(f"{wheel.name} {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
