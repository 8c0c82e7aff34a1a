# SPDX-License-Identifier: MIT
"""Check the layers of src/cpp: a directory ("room") includes itself, lower ones and public headers.

Prints each include of a higher layer and fails if there is any. See `docs/architecture.md`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "cpp"

# The rooms directly below each room, lower ones first. Includes are transitive.
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

if __name__ == "__main__":
    allowed: dict[str, set[str]] = {}
    for room, below in BELOW.items():
        allowed[room] = {room, "fusedadam"}.union(*(allowed[lower] for lower in below))
    found = [
        f"{path.relative_to(SOURCES.parents[1])} must not include {name}"
        for path in sorted(SOURCES.rglob("*.[ch]*"))
        for name in re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.MULTILINE)
        if name.split("/")[0] not in allowed[path.relative_to(SOURCES).parts[0]]
    ]
    sys.exit("\n".join(found) or 0)
