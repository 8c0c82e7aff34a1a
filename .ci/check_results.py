# SPDX-License-Identifier: MIT
"""Check results of bench/run.py: all peers present, rows in every section, no failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A contender that reports that it does not support a task has not failed. Exceptions and wrong
# results are failures.
FAILURES = ("Error", "wrong result")


def problems(results: dict[str, Any]) -> Iterator[str]:
    """Yield the problems of a run."""
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
    """Check the given file; return 1 if it has problems."""
    found = list(problems(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
