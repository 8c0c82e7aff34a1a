# SPDX-License-Identifier: MIT
"""Check a file of bench/run.py: every peer was there, every section has rows, nothing failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a contender that cannot do a work says of itself is no failure; an exception or a wrong result is.
FAILURES = ("Error", "wrong result")


def problems(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a run."""
    for peer, why in results["absent"].items():
        yield f"absent: {peer}: {why}"
    for name, section in results["sections"].items():
        if "error" in section:
            yield f"{name}: {section['error']}"
        if not section["rows"]:
            yield f"{name}: no rows"
        for part in (section, *section["rows"]):
            not_run = part.get("not_run")
            for who, why in not_run.items() if isinstance(not_run, dict) else ():
                if any(word in why for word in FAILURES):
                    yield f"{name}: {who}: {why}"


def main() -> int:
    """Check the file given; return 1 if something is wrong."""
    found = list(problems(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
