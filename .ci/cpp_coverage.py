# SPDX-License-Identifier: MIT
"""Report line and branch coverage of the C++ core by the tests of an instrumented build.

`python3 .ci/cpp_coverage.py build/asan` prints a row for each file, the total, and each line and
branch that was not executed. Fails if the total of lines or of branches is below FAIL_UNDER.

A branch is an outcome of a condition, including each operand of && and ||. It counts as executed if
any instantiation of its template executed it, for any instruction set. `if constexpr` and exceptions
have no branches.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

CORE = Path(__file__).resolve().parent.parent / "src" / "cpp"
FAIL_UNDER = 98.0  # percent

# Execution counts by (file, line) or (file, line, column, outcome).
Counts: TypeAlias = "defaultdict[tuple[Any, ...], int]"


def llvm(name: str, *arguments: str | Path) -> str:
    """Return the output of an LLVM tool, which may have Debian's version suffix."""
    names = [name, *(f"{name}-{version}" for version in range(30, 11, -1))]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit(f"{name} is needed and not on PATH")
    return subprocess.run([found, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def core_file(name: str) -> str | None:
    """Return a path relative to the core; None for bindings, tests and system headers."""
    path = Path(os.path.normpath(name))  # ccache makes paths relative
    if not path.is_relative_to(CORE) or path.is_relative_to(CORE / "bindings"):
        return None
    return str(path.relative_to(CORE))


def counted(build: Path) -> tuple[Counts, Counts]:
    """Return the counts of lines with code, and of outcomes of conditions."""
    merged = build / "merged.profdata"
    profiles = sorted((build / "profiles").glob("*.profraw"))
    llvm("llvm-profdata", "merge", "-sparse", "-o", merged, *profiles)
    programs = sorted(p for p in (build / "tests/cpp").glob("fusedadam_*tests") if p.is_file())
    objects = [argument for program in programs for argument in ("-object", program)][1:]
    export = ["export", f"-instr-profile={merged}", *objects]

    lines: Counts = defaultdict(int)
    file = None
    for record in llvm("llvm-cov", *export, "-format=lcov").splitlines():
        key, _, value = record.partition(":")
        if key == "SF":
            file = core_file(value)
        elif key == "DA" and file is not None:
            number, count = value.split(",")[:2]
            lines[file, int(number)] += int(count)
    branches: Counts = defaultdict(int)
    # By function: only there, LLVM omits conditions that the compiler decides.
    for function in json.loads(llvm("llvm-cov", *export, "-format=text"))["data"][0]["functions"]:
        for line, column, last, end, true, false, index, *_ in function["branches"]:
            if (file := core_file(function["filenames"][index])) is None:
                continue
            # Selects between vectors are no branches; LLVM counts them as true.
            text = (CORE / file).read_text().splitlines()[last - 1]
            if not (file.startswith("kernels/") and text[end - 1 :].startswith(" ?")):
                branches[file, line, column, "true"] += true
                branches[file, line, column, "false"] += false
    return lines, branches


def main() -> None:
    """Print the report; exit with an error if coverage is below the threshold."""
    totals = counted(Path(sys.argv[1]))
    print(f"{'':34}{'lines':>22}{'branches':>22}")
    failed = False
    for file in [*sorted({place[0] for place in totals[0]}), "all"]:
        row = f"{file:34}"
        for counts in totals:
            own = [count > 0 for place, count in counts.items() if file in (place[0], "all")]
            percent = 100 * sum(own) / len(own) if own else 0.0
            row += f"{sum(own):5} of {len(own):4} {percent:7.2f} %"
            failed |= file == "all" and percent < FAIL_UNDER
        print(row)
    for file, *place in sorted(p for counts in totals for p, count in counts.items() if not count):
        print(f"{file}:{':'.join(map(str, place))}: never executed")
    sys.exit(f"below {FAIL_UNDER} % of lines or branches" if failed else 0)


if __name__ == "__main__":
    main()
