# SPDX-License-Identifier: MIT
"""Check the layers of src/cpp: a directory ("room") includes itself, lower ones and public headers.

    python .ci/rooms.py

Prints each include of a higher layer and exits with status 1 if there is any. `docs/architecture.md`
describes the rooms.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "cpp"

# The rooms directly below each room. Includes are transitive.
BELOW = {
    "include": [],
    "kernels": [],
    "cpu": ["kernels"],
    "parallel": [],
    "memory": ["kernels"],
    "step": ["memory", "parallel", "cpu"],
    "api": ["step"],
    "bindings": ["api"],
}


def allowed(room: str) -> set[str]:
    """Return the rooms that files of this room may include."""
    return {room}.union(*(allowed(below) for below in BELOW[room]))


def upward(path: Path) -> list[str]:
    """Return the includes that a file's room does not allow."""
    room = path.relative_to(SOURCES).parts[0]
    included = re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    public = [name for name in included if name.startswith("fusedadam/")]
    return [
        name for name in included if name not in public and name.split("/")[0] not in allowed(room)
    ]


if __name__ == "__main__":
    found = [
        f"{path.relative_to(SOURCES.parents[1])} must not include {name}"
        for path in sorted(SOURCES.rglob("*.[ch]pp"))
        for name in upward(path)
    ]
    sys.exit("\n".join(found) or 0)
