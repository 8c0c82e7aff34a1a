# SPDX-License-Identifier: MIT
"""Report line and branch coverage of the C++ core by the tests built with preset `coverage`.

`python3 .ci/cpp_coverage.py build/coverage` prints a row for each file, the total, and each line and
branch that was not executed. Fails if the total of lines or of branches is below --fail-under.

A branch is an outcome of a condition, including each operand of && and ||. It counts as executed if
any instantiation of its template executed it, for any instruction set. `if constexpr` and exceptions
have no branches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

CORE = Path(__file__).resolve().parent.parent / "src" / "cpp"

# Execution counts by (line,) or (line, column, outcome).
Counts: TypeAlias = defaultdict[tuple[Any, ...], int]


def tool(name: str) -> str:
    """Return the path of an LLVM tool, with or without Debian's version suffix."""
    for candidate in (name, *(f"{name}-{version}" for version in range(30, 11, -1))):
        if found := shutil.which(candidate):
            return found
    raise SystemExit(f"{name} is needed and not on PATH")


def merged_profile(build: Path) -> Path:
    """Merge the profiles of all test processes."""
    profiles = sorted((build / "profiles").glob("*.profraw"))
    if not profiles:
        raise SystemExit(f"{build} has no profiles: build and run the tests first")
    merged = build / "merged.profdata"
    subprocess.run([tool("llvm-profdata"), "merge", "-sparse", "-o", merged, *profiles], check=True)
    return merged


def export(build: Path, profile: Path, form: str) -> str:
    """Return the counts in one of llvm-cov's formats."""
    first, *others = sorted(
        path for path in (build / "tests" / "cpp").glob("fusedadam_*tests") if path.is_file()
    )
    objects = [argument for program in others for argument in ("-object", program)]
    done = subprocess.run(
        [
            tool("llvm-cov"),
            "export",
            f"-format={form}",
            f"-instr-profile={profile}",
            first,
            *objects,
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def core_file(name: str) -> str | None:
    """Return a path relative to the core; None for bindings, tests and system headers."""
    path = Path(name)
    if not path.is_relative_to(CORE) or path.is_relative_to(CORE / "bindings"):
        return None
    return str(path.relative_to(CORE))


def count_lines(tracefile: str) -> dict[str, Counts]:
    """Return the counts of lines with code, by file."""
    lines: dict[str, Counts] = defaultdict(lambda: defaultdict(int))
    file = None
    for record in tracefile.splitlines():
        key, _, value = record.partition(":")
        if key == "SF":
            file = core_file(value)
        elif key == "DA" and file is not None:
            number, count = value.split(",")[:2]
            lines[file][(int(number),)] += int(count)
    return lines


def count_branches(report: str) -> dict[str, Counts]:
    """Return the counts of outcomes of conditions, by file."""
    branches: dict[str, Counts] = defaultdict(lambda: defaultdict(int))
    # By function: only there, LLVM omits conditions that the compiler decides.
    for function in json.loads(report)["data"][0]["functions"]:
        for line, column, _, _, true, false, file_index, *_ in function["branches"]:
            if (file := core_file(function["filenames"][file_index])) is not None:
                branches[file][line, column, "true"] += true
                branches[file][line, column, "false"] += false
    return branches


def percent(counts: Counts) -> float:
    """Return the percentage of executed places."""
    return 100 * sum(count > 0 for count in counts.values()) / len(counts) if counts else 100


def row(name: str, lines: Counts, branches: Counts) -> str:
    """Return a row of the table."""
    cells = (
        f"{sum(count > 0 for count in counts.values()):5} of {len(counts):4} {percent(counts):7.2f} %"
        for counts in (lines, branches)
    )
    return f"{name:34}" + "".join(cells)


def missed(file: str, lines: Counts, branches: Counts) -> Iterator[str]:
    """Yield the places of a file that were never executed."""
    for (line,) in sorted(place for place, count in lines.items() if count == 0):
        yield f"{file}:{line}: never executed"
    for line, column, outcome in sorted(place for place, count in branches.items() if count == 0):
        yield f"{file}:{line}:{column}: never {outcome}"


def together(counts: dict[str, Counts]) -> Counts:
    """Combine the counts of all files."""
    total: Counts = defaultdict(int)
    for file, places in counts.items():
        total.update({(file, *place): count for place, count in places.items()})
    return total


def main() -> int:
    """Print the report; return 1 if coverage is below the threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="the build directory of preset coverage")
    parser.add_argument("--fail-under", type=float, default=95.0, help="percent")
    arguments = parser.parse_args()

    profile = merged_profile(arguments.build)
    lines = count_lines(export(arguments.build, profile, "lcov"))
    branches = count_branches(export(arguments.build, profile, "text"))
    print(f"{'':34}{'lines':>22}{'branches':>22}")
    for file in sorted(lines):
        print(row(file, lines[file], branches[file]))
    total = together(lines), together(branches)
    print(row("all", *total))
    for file in sorted(lines):
        for place in missed(file, lines[file], branches[file]):
            print(place)
    failed = [
        f"{percent(counts):.2f} %" for counts in total if percent(counts) < arguments.fail_under
    ]
    if failed:
        print(f"below {arguments.fail_under} %: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
