# SPDX-License-Identifier: MIT
"""Check the hardening (cmake/hardening.cmake) of a Linux shared library."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Instructions that mark valid targets of indirect calls, little-endian.
LANDING_PADS = {
    "X86-64": {0xFA1E0FF3: "endbr64"},
    "AArch64": {0xD503245F: "bti c", 0xD503233F: "paciasp"},
}
# _FORTIFY_SOURCE replaces all calls of these, whatever their arguments.
NEVER_IMPORTED_FORTIFIED = {
    *("printf", "fprintf", "sprintf", "snprintf", "dprintf", "asprintf"),
    *("vprintf", "vfprintf", "vsprintf", "vsnprintf", "vdprintf", "vasprintf", "longjmp"),
}


def readelf(path: Path, *options: str) -> str:
    """Return readelf's output; it reads files of any architecture."""
    command = ["readelf", "--wide", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def any_library_problems(path: Path) -> Iterator[str]:
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


def module_problems(path: Path, exported: str) -> Iterator[str]:
    """Yield signs that our module was built without the project's hardening."""
    dynamic, symbols = readelf(path, "--dynamic"), readelf(path, "--dyn-syms")
    machine = re.search(r"Machine:.*?(X86-64|AArch64)", readelf(path, "--file-header"))
    if not re.search(r"\(FLAGS\).*BIND_NOW", dynamic):
        yield "no BIND_NOW: its global offset table stays writable"
    rows = [line.split() for line in symbols.splitlines() if re.match(r"\s*\d+: ", line)]
    # Columns: number, value, size, type, binding, visibility, section, name[@version].
    names = {row[7].partition("@")[0]: row for row in rows if len(row) > 7}
    if "__stack_chk_fail" not in names:
        yield "no stack protector: __stack_chk_fail is not imported"
    if unchecked := NEVER_IMPORTED_FORTIFIED.intersection(names):
        yield f"imports that _FORTIFY_SOURCE would have replaced: {sorted(unchecked)}"
    public = [name for name, row in names.items() if row[6] != "UND" and row[4] != "LOCAL"]
    if public != [exported]:
        yield f"exports {len(public)} symbols, not {exported} alone: {sorted(public)[:3]}"
    if machine is None:
        yield "is for an unknown machine"
        return
    if exported in names:
        word = word_at(path, int(names[exported][1], 16))
        if word not in LANDING_PADS[machine[1]]:
            pads = " or ".join(LANDING_PADS[machine[1]].values())
            yield f"does not begin a function with {pads}: {word:#010x}"
    # Not checked for BTI: the linker requires the mark on all files, and the C library's start
    # files often lack it.
    if machine[1] == "X86-64" and "SHSTK" not in readelf(path, "--notes"):
        yield "is not marked as compatible with the shadow stack (SHSTK)"


def word_at(path: Path, address: int) -> int:
    """Return the four bytes at a virtual address of the library."""
    pattern = r"LOAD\s+(0x\S+)\s+(0x\S+)\s+0x\S+\s+(0x\S+)"
    for found in re.findall(pattern, readelf(path, "--program-headers")):
        offset, start, size = (int(number, 16) for number in found)
        if start <= address < start + size:
            with path.open("rb") as file:
                file.seek(address - start + offset)
                return int.from_bytes(file.read(4), "little")
    raise ValueError(f"address must lie in a segment of {path}. Received: {address:#x}")
