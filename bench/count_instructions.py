# SPDX-License-Identifier: MIT
"""Count the instructions of each stage of a step, and compare them with the record.

Times vary with the machine and its load. The number of instructions is the same in every run, even
on a busy machine, so CI can check it: a kernel that is no longer vectorized executes four to eight
times as many. The count says nothing about how long an instruction takes; `bench_adam` measures
that.

    python bench/count_instructions.py build/release/bench/count_instructions            # compare
    python bench/count_instructions.py build/release/bench/count_instructions --update   # record

runs that program (`count_instructions.cpp`) under Valgrind's callgrind, once per instruction set
except AVX-512, which callgrind does not support. The program makes calls with two sizes of a
tensor, two numbers of tensors and two numbers of rows. Differences of their counts cancel all work
that is done once. They give the instructions per element of each stage, per tensor, per row and
per call. Each call is counted twice, and the two counts must be equal.

Exits with 1 if a count exceeds the record by more than a margin. Counts depend on the compiler,
which the record names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

RECORD = Path(__file__).with_name("instructions.json")
ISAS = ("avx2", "baseline")

# With the recorded compiler, an unchanged loop has exactly the recorded count. The loop of the
# plain update has 27 instructions (AVX2). Ten percent tolerate one or two more, but no stage that
# runs twice.
ELEMENT_MARGIN = 0.10
# Work per tensor, row or call includes code of the C and C++ libraries (memory, sorting), whose
# versions are not recorded.
OTHER_MARGIN = 0.25
# Another compiler generates different code for the same loops. Vectors of half the width double a
# count, so the margin is smaller than that.
OTHER_COMPILER_MARGIN = 0.75


class Key(NamedTuple):
    """What a count is of: instructions of `stage` per `unit`."""

    isa: str
    dtype: str
    stage: str
    unit: str


Counts: TypeAlias = dict[Key, float]


class Call(NamedTuple):
    """A measured call on `number` tensors (lazy rows: rows) of `size` elements each."""

    dtype: str
    stage: str
    number: int
    size: int


class CountError(Exception):
    """The counts are not available or not meaningful."""


@dataclass(frozen=True)
class Run:
    """The result of running the program under callgrind."""

    compiler: str  # "GNU 12.2.0"
    calls: dict[Call, int]


@dataclass(frozen=True)
class Record:
    """The recorded counts, and the versions of the compiler and of Valgrind they are from."""

    compiler: str
    valgrind: str
    counts: Counts


# ---- running -----------------------------------------------------------------------------------


def run(program: Path, isa: str, valgrind: str) -> Run:
    """Run the program and return the instruction count of each call."""
    # Variables of the caller's shell must not influence the counts.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "FUSEDADAM_"))
    }
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "calls"
        command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={out}", str(program), isa]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise CountError(f"valgrind must run {program} {isa}. Received: {done.stderr.strip()}")
        # calls.1, calls.2 and so on, in the order of the calls.
        paths = sorted(Path(directory).glob("calls.*"), key=lambda path: int(path.suffix[1:]))
        texts = [path.read_text() for path in paths]
    compiler, build_type = done.stdout.splitlines()
    if build_type != "Release":
        raise CountError(f"the program must be a Release build. Received: {build_type!r}")
    return Run(compiler, equal_calls(parse(text) for text in texts))


def parse(text: str) -> tuple[str, int] | None:
    """Return the label and the count from a callgrind output file, or None without a label."""
    label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
    summary = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
    if label is None or summary is None:
        return None  # the dump at exit
    return label[1], int(summary[1])


def equal_calls(labelled: Iterator[tuple[str, int] | None]) -> dict[Call, int]:
    """Return the count of each call. Raise if its repetition has another count."""
    repeats: dict[Call, list[int]] = {}
    for item in labelled:
        if item is not None:
            dtype, stage, number, size, _ = item[0].split("/")
            repeats.setdefault(Call(dtype, stage, int(number), int(size)), []).append(item[1])
    if not repeats:
        raise CountError("callgrind must write a file for each call. Received: none")
    for call, counts in repeats.items():
        if len(counts) != 2 or counts[0] != counts[1]:
            raise CountError(
                f"two equal calls must take equal instructions. Received: {call}, {counts}"
            )
    return {call: counts[0] for call, counts in repeats.items()}


# ---- from calls to counts ----------------------------------------------------------------------


def slope(points: Mapping[int, float]) -> float:
    """Return the cost per unit, from the points with the two largest numbers of units."""
    (few, cost_of_few), (many, cost_of_many) = sorted(points.items())[-2:]
    return (cost_of_many - cost_of_few) / (many - few)


# Calls with many small tensors -> the stage that has the same cost per element.
OVER_SMALL_TENSORS = {"prepared": "plain", "prepared tail": "tail", "adam_step": "plain"}
LAZY_ROWS = "lazy rows"


def counts_of(calls: Mapping[Call, int], isa: str) -> Counts:
    """Derive counts per unit from the counts of calls."""
    by_stage: dict[tuple[str, str], dict[tuple[int, int], int]] = {}
    for call, instructions in calls.items():
        by_stage.setdefault(call[:2], {})[call[2:]] = instructions

    counts: Counts = {}
    for (dtype, stage), costs in by_stage.items():
        if stage not in OVER_SMALL_TENSORS:
            fewest = min(number for number, _ in costs)
            by_size = {size: cost / fewest for (n, size), cost in costs.items() if n == fewest}
            counts[Key(isa, dtype, stage, "element")] = slope(by_size)
    for (dtype, stage), costs in by_stage.items():
        if stage in OVER_SMALL_TENSORS or stage == LAZY_ROWS:
            elements_like = OVER_SMALL_TENSORS.get(stage, stage)
            per_element = counts[Key(isa, dtype, elements_like, "element")]
            smallest = min(size for _, size in costs)
            by_number = {n: float(cost) for (n, size), cost in costs.items() if size == smallest}
            unit = "row" if stage == LAZY_ROWS else "tensor"
            counts[Key(isa, dtype, stage, unit)] = slope(by_number) - smallest * per_element
            if stage != LAZY_ROWS:
                counts[Key(isa, dtype, stage, "call")] = by_number[1] - smallest * per_element
    return counts


# ---- comparing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A count and its recorded value."""

    key: Key
    count: float | None
    recorded: float | None
    margin: float

    @property
    def change(self) -> float | None:
        """The relative change from the record, or None if either is missing."""
        if self.count is None or self.recorded is None:
            return None
        return self.count / self.recorded - 1

    @property
    def fails(self) -> bool:
        """Whether the count exceeds the margin or either side is missing."""
        return self.change is None or self.change > self.margin

    @property
    def is_far_below(self) -> bool:
        """Whether the count is so far below the record that the record should be updated."""
        return self.change is not None and self.change < -self.margin


def same_compiler(one: str, other: str) -> bool:
    """Whether two compilers, such as "GNU 12.2.0", have the same family and major version."""
    return one.split(".")[0] == other.split(".")[0]


def compare(counts: Counts, compiler: str, record: Record) -> list[Row]:
    """Pair each count with its recorded value."""
    same = same_compiler(compiler, record.compiler)

    def margin(key: Key) -> float:
        if not same:
            return OTHER_COMPILER_MARGIN
        return ELEMENT_MARGIN if key.unit == "element" else OTHER_MARGIN

    return [
        Row(key, counts.get(key), record.counts.get(key), margin(key))
        for key in dict.fromkeys([*counts, *record.counts])
    ]


LINE = "{:<8}  {:<7}  {:<20}  {:<16}  {:>9}  {:>9}  {:>8}{}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield LINE.format(
        "isa", "dtype", "stage", "instructions per", "count", "record", "change", ""
    ).rstrip()
    for row in rows:
        count, recorded = (
            "none" if number is None else f"{number:.3f}" for number in (row.count, row.recorded)
        )
        change = "" if row.change is None else f"{row.change:+.1%}"
        mark = "  <-- fails" if row.fails else "  <-- far below" if row.is_far_below else ""
        yield LINE.format(*row.key, count, recorded, change, mark)


def verdict(rows: Sequence[Row], compiler: str, record: Record) -> tuple[int, str]:
    """Return the exit status and a message."""
    lines = []
    if not same_compiler(compiler, record.compiler):
        lines.append(
            f"The record is of {record.compiler}, this is {compiler}: the margin is"
            f" {OTHER_COMPILER_MARGIN:.0%}, which sees only that a loop has lost its vectors."
        )
    unmatched = [row for row in rows if row.change is None]
    above = [row for row in rows if row.change is not None and row.fails]
    if above:
        lines.append(
            f"Above the record by more than the margin: {len(above)}. Is a loop no longer vectorized?"
            " Where the instructions are worth it, --update records them, and the commit says why."
        )
    if unmatched:
        lines.append(f"New or gone: {len(unmatched)}. --update records them.")
    if any(row.is_far_below for row in rows):
        lines.append("Counts are far below the record: --update records what was gained.")
    if not lines:
        lines.append("All counts are as recorded, within the margin.")
    return int(bool(above or unmatched)), "\n".join(lines)


# ---- the record --------------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """Read a file that `write_record` wrote."""
    data: dict[str, Any] = json.loads(path.read_text())
    counts = {
        Key(isa, dtype, stage, unit): count
        for isa, dtypes in data["instructions"].items()
        for dtype, stages in dtypes.items()
        for stage, units in stages.items()
        for unit, count in units.items()
    }
    return Record(data["compiler"], data["valgrind"], counts)


def write_record(path: Path, record: Record) -> None:
    """Write a record with one count per line, which makes diffs readable."""
    tree: dict[str, Any] = {}
    for key, count in record.counts.items():
        tree.setdefault(key.isa, {}).setdefault(key.dtype, {}).setdefault(key.stage, {})[
            key.unit
        ] = round(count, 3)
    data = {"compiler": record.compiler, "valgrind": record.valgrind, "instructions": tree}
    path.write_text(json.dumps(data, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the table, and compare or record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path, help="count_instructions of a Release build")
    parser.add_argument("--record", type=Path, default=RECORD, help="(%(default)s)")
    parser.add_argument("--update", action="store_true", help="write the record, compare nothing")
    parser.add_argument(
        "--check", action="store_true", help="compare with the record, which is the default"
    )
    args = parser.parse_args(argv)
    if args.update and args.check:
        parser.error("--check and --update must not be given together")
    if not args.program.is_file():
        parser.error(f"program must be a file. Received: {args.program}")
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        parser.error("valgrind must be installed")

    counts: Counts = {}
    try:
        for isa in ISAS:
            result = run(args.program, isa, valgrind)
            counts |= counts_of(result.calls, isa)
    except CountError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.update:
        version = subprocess.run(
            [valgrind, "--version"], check=True, capture_output=True, text=True
        )
        number = version.stdout.strip().removeprefix("valgrind-")
        write_record(args.record, Record(result.compiler, number, counts))
        print(f"{args.record}: {len(counts)} counts of {result.compiler}, valgrind {number}")
        return 0
    record = read_record(args.record)
    rows = compare(counts, result.compiler, record)
    status, words = verdict(rows, result.compiler, record)
    print(*table(rows), "", words, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
