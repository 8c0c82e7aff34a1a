# SPDX-License-Identifier: MIT
"""Count the instructions of each stage of a step, and compare them with the record.

    python bench/native/count_instructions.py build/release/bench/native/count_instructions [--update]

Times vary with the machine and its load. The number of instructions is the same in every run, even
on a busy machine, so CI can check it: a kernel that is no longer vectorized executes four to eight
times as many. The program makes each call with few and with many units of work (elements, tensors,
rows), under Valgrind's callgrind, which does not know AVX-512. The difference of the two counts has
nothing that is done once. Exits with 1 if a count exceeds the record by more than a margin.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).with_name("instructions.json")
ISAS = ("avx2", "baseline")
# An unchanged loop has exactly the recorded count, and ten percent tolerate one or two instructions
# more. Work per tensor or row includes code of the C and C++ libraries. Another compiler generates
# other code; vectors of half the width double a count.
MARGIN, MARGIN_OF_TENSORS, MARGIN_OF_OTHER_COMPILERS = 0.10, 0.25, 0.75


def count(program: str, isa: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the compiler, and the instructions per unit: stage -> "isa dtype" -> count."""
    with tempfile.TemporaryDirectory() as directory:
        out = f"--callgrind-out-file={directory}/calls"
        done = subprocess.run(
            # Not the caller's environment, whose variables could change what is counted.
            ["valgrind", "--tool=callgrind", out, program, isa],
            check=True, env={"PATH": "/usr/bin:/bin"}, text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        texts = [path.read_text() for path in Path(directory).glob("calls.*")]
    totals: dict[tuple[str, str], dict[int, int]] = {}
    for text in texts:
        label = re.search(r"^desc: Trigger: Client Request: (.+)/(.+)/(\d+)$", text, re.MULTILINE)
        summary = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
        if label and summary:  # not the dump at exit
            totals.setdefault((label[2], label[1]), {})[int(label[3])] = int(summary[1])
    counts: dict[str, dict[str, float]] = {}
    for (stage, dtype), by_units in sorted(totals.items()):
        (few, less), (many, more) = sorted(by_units.items())
        counts.setdefault(stage, {})[f"{isa} {dtype}"] = round((more - less) / (many - few), 3)
    return done.stdout.strip(), counts


def compare(
    counts: dict[str, dict[str, float]], record: dict[str, dict[str, float]], *, same_compiler: bool
) -> int:
    """Print a table, and return how many counts exceed the record, are new or are missing."""
    failed = 0
    for stage in {**record, **counts}:
        now, before = counts.get(stage, {}), record.get(stage, {})
        margin = MARGIN_OF_TENSORS if " of " in stage else MARGIN
        margin = margin if same_compiler else MARGIN_OF_OTHER_COMPILERS
        for column in {**before, **now}:
            found, known = now.get(column), before.get(column)
            fails = found is None or known is None or found > known * (1 + margin)
            failed += fails
            mark = " <-- fails" if fails else ""
            print(f"{stage:<28} {column:<18} {found} (recorded: {known}){mark}")
    return failed


def main() -> int:
    """Count, and compare with the record or replace it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="count_instructions of a Release build")
    parser.add_argument("--update", action="store_true", help="write the record, compare nothing")
    args = parser.parse_args()
    counts: dict[str, dict[str, float]] = {}
    for isa in ISAS:
        compiler, of_isa = count(args.program, isa)
        for stage, columns in of_isa.items():
            counts.setdefault(stage, {}).update(columns)
    if args.update:
        rows = ",\n".join(f"  {json.dumps(s)}: {json.dumps(c)}" for s, c in counts.items())
        RECORD.write_text(f'{{\n "compiler": "{compiler}",\n "instructions": {{\n{rows}\n }}\n}}\n')
        return 0
    record = json.loads(RECORD.read_text())
    same = compiler.split(".")[0] == record["compiler"].split(".")[0]
    failed = compare(counts, record["instructions"], same_compiler=same)
    print(f"Recorded with {record['compiler']}, counted with {compiler}: {failed} failed.")
    if failed:
        print("Is a loop no longer vectorized? --update records the new counts.", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
