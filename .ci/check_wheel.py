# SPDX-License-Identifier: MIT
"""Check repaired Linux wheels: what is inside, and the hardening (cmake/hardening.cmake) of the module.

    python3 .ci/check_wheel.py WHEEL...

A wheel has the module, its type stubs and libgomp, and nothing else. Needs readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

MODULE = r"fusedadam/_core\..*\.so"
REQUIRED = (
    MODULE,
    r"fusedadam/_core\.pyi",
    r"fusedadam/py\.typed",
    r"fusedadam\.libs/libgomp-.*\.so\..*",
    r"fusedadam-.*\.dist-info/licenses/LICENSE",
)
# Headers, CMake files and the static library belong to the C++ package. Other shared libraries
# belong to the system (manylinux guarantees libstdc++ and libc).
ALLOWED = (*REQUIRED, r"fusedadam/[a-z_/]+\.py", r"fusedadam-.*\.dist-info/.*")
EXPORTED = "PyInit__core"
# _FORTIFY_SOURCE replaces all calls of these, whatever their arguments.
NEVER_IMPORTED_FORTIFIED = {
    *("printf", "fprintf", "sprintf", "snprintf", "dprintf", "asprintf"),
    *("vprintf", "vfprintf", "vsprintf", "vsnprintf", "vdprintf", "vasprintf", "longjmp"),
}


def readelf(path: Path, *options: str) -> str:
    """Return readelf's output; it reads files of any architecture."""
    command = ["readelf", "--wide", *options, str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def library_problems(path: Path) -> Iterator[str]:
    """Yield problems that no shared library in a wheel may have, whoever built it."""
    headers, dynamic = readelf(path, "--program-headers"), readelf(path, "--dynamic")
    stack = re.search(r"GNU_STACK(?:\s+0x[0-9a-f]+){5}\s+(\S+)", headers)
    if stack is None or stack[1] != "RW":
        yield f"an executable stack (GNU_STACK: {stack and stack[1]})"
    if re.search(r"LOAD(?:\s+0x[0-9a-f]+){5}\s+RWE", headers):
        yield "a segment that is writable and executable"
    if "GNU_RELRO" not in headers:
        yield "no GNU_RELRO segment"
    if "TEXTREL" in dynamic:
        yield "relocations in its code (TEXTREL)"
    for found in re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", dynamic):
        if strange := [part for part in found.split(":") if not part.startswith("$ORIGIN/")]:
            yield f"a search path outside the wheel: {strange}"


def module_problems(path: Path) -> Iterator[str]:
    """Yield signs that our module was built without the project's hardening."""
    if not re.search(r"\(FLAGS\).*BIND_NOW", readelf(path, "--dynamic")):
        yield "no BIND_NOW: its global offset table stays writable"
    rows = [row.split() for row in re.findall(r"\n\s*\d+: .*", readelf(path, "--dyn-syms"))]
    # Columns: number, value, size, type, binding, visibility, section, name[@version].
    names = {row[7].partition("@")[0]: row for row in rows if len(row) > 7}
    if "__stack_chk_fail" not in names:
        yield "no stack protector: __stack_chk_fail is not imported"
    if unchecked := NEVER_IMPORTED_FORTIFIED.intersection(names):
        yield f"imports that _FORTIFY_SOURCE would have replaced: {sorted(unchecked)}"
    public = [name for name, row in names.items() if row[6] != "UND" and row[4] != "LOCAL"]
    if public != [EXPORTED]:
        yield f"exports {len(public)} symbols, not {EXPORTED} alone: {sorted(public)[:3]}"
    # Not checked for AArch64: the C library's start files often lack its mark.
    notes = readelf(path, "--file-header", "--notes")
    if "X86-64" in notes and "SHSTK" not in notes:
        yield "is not marked as compatible with the shadow stack (SHSTK)"


def problems(wheel: Path) -> Iterator[str]:
    """Yield the problems of a wheel."""
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for pattern in REQUIRED:
            if not any(re.fullmatch(pattern, name) for name in names):
                yield f"lacks {pattern}"
        for name in names:
            if not any(re.fullmatch(pattern, name) for pattern in ALLOWED):
                yield f"carries {name}"
            if ".so" not in Path(name).suffixes:
                continue
            path = Path(archive.extract(name, directory))
            found = list(library_problems(path))
            if re.fullmatch(MODULE, name):
                found += module_problems(path)
            yield from (f"has {name}, which: {problem}" for problem in found)
    if "manylinux" not in wheel.name:
        yield "has no manylinux tag"


if __name__ == "__main__":
    found = [f"{w} {problem}" for w in sys.argv[1:] for problem in problems(Path(w))]
    sys.exit("\n".join(found) or not sys.argv[1:])
