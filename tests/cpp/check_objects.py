# SPDX-License-Identifier: MIT
"""Check the symbols and instructions that the compiler generated for the kernels.

Each kernel object is given with the instruction set for which it was compiled:

    python check_objects.py baseline=adam_baseline.o avx2=adam_avx2.o avx512=adam_avx512.o

Needs an optimized build without sanitizers, which add calls of their own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class InstructionSet(NamedTuple):
    """How `objdump` prints the instructions that a kernel must or must not contain."""

    packed: dict[str, str]  # name to a pattern of "mnemonic operands", full width
    other_sqrt: str  # a square root of any width
    forbidden: dict[str, str]  # reason to pattern


# A fused multiply-add rounds once where the formula rounds twice. An estimate is not the correctly
# rounded quotient or root. Both change the bits.
X86_INEXACT = {
    "fused multiply-add": r"v(4)?fn?m(add|sub)",
    "reciprocal estimate": r"v?(rcp|rsqrt)",
}


def x86(prefix: str, register: str, too_new: dict[str, str]) -> InstructionSet:
    """Describe an x86-64 set by the prefix of its mnemonics and its widest registers."""
    return InstructionSet(
        packed={
            f"{prefix}{operation}": rf"{prefix}{operation}\s.*%{register}"
            for operation in ("sqrtps", "divps", "sqrtpd", "divpd")
        },
        other_sqrt=r"v?sqrt[ps][sd]\s",
        forbidden=X86_INEXACT | too_new,
    )


INSTRUCTION_SETS = {
    "baseline": x86("", "xmm", {"newer instruction set": r"v(?!err|erw)|.*%[yz]mm"}),
    "avx2": x86("v", "ymm", {"newer instruction set": r".*%(zmm|k[0-7]|[xy]mm(1[6-9]|2\d|3[01]))"}),
    "avx512": x86("v", "zmm", {}),
    "neon": InstructionSet(
        packed={
            f"{operation} v.{shape}": rf"{operation}\s+v\d+\.{shape}"
            for operation in ("fsqrt", "fdiv")
            for shape in ("4s", "2d")
        },
        other_sqrt=r"fsqrt\s",
        forbidden={
            "fused multiply-add": r"b?fn?m(add|sub|la|ls|ad|sb)|fcmla",
            "reciprocal estimate": r"fr(ecp|sqrt)",
            "newer instruction set": r".*\b[zp]\d+\.[bhsd]",
        },
    ),
}

# Each precision has four variants of the update: with and without flushed moments, with and without
# AMSGrad. Some share a function, where one vectorized loop could hide another that is not.
UPDATE_VARIANTS = 4

# The program that links a kernel supplies these. Other undefined symbols are errors: a library
# function could have been compiled for another instruction set, and a call of memcpy or memset
# means that the compiler replaced a loop by it.
ALLOWED_UNDEFINED = frozenset({"_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail", "__stack_chk_guard"})


def run(*command: str) -> list[str]:
    """Return the output lines of a binutils program."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check_symbols(path: Path, nm: str) -> Iterator[str]:
    """Yield the errors in the symbols of an object."""
    has_entry = False
    for line in run(nm, "--demangle", str(path)):
        match = re.fullmatch(r"[0-9a-f]*\s+(\S)\s(.*)", line)
        if match is None:
            continue
        kind, name = match.groups()
        # The linker keeps one copy of a weak symbol, from any object. A machine without AVX-512
        # could then get the copy that was compiled for AVX-512.
        if kind in "WwVvu":
            yield f"weak or unique symbol ({kind}): {name}"
        elif kind == "U" and name not in ALLOWED_UNDEFINED:
            yield f"undefined symbol: {name}"
        has_entry |= kind in "TDR"  # a function or a table of functions
    if not has_entry:
        yield "no global function or table: not a kernel object?"


def functions(path: Path, objdump: str) -> dict[str, list[str]]:
    """Return the instructions of every function, as "mnemonic operands"."""
    listing: dict[str, list[str]] = {}
    instructions: list[str] = []
    for line in run(objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(path)):
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            # Two functions in different unnamed namespaces can share a name.
            instructions = listing.setdefault(header[1], [])
        elif instruction := re.match(r"\s+[0-9a-f]+:\t(.*)", line):
            # Prefixes belong to an instruction. The reference after "#", "//" or "<" does not.
            text = re.sub(r"^((data16|cs|lock|notrack|rep[nz]*|\{\w+\})\s+)+", "", instruction[1])
            instructions.append(re.split(r"\s*(?:#|//|<)", text)[0])
    return listing


def check_instructions(path: Path, isa: InstructionSet, objdump: str) -> Iterator[str]:
    """Yield the errors in the machine code of an object."""
    listing = functions(path, objdump)
    for name, pattern in isa.packed.items():
        count = sum(re.match(pattern, i) is not None for code in listing.values() for i in code)
        if count < UPDATE_VARIANTS:
            yield f"{count} {name} of full width, for {UPDATE_VARIANTS} variants of the update"
    packed_sqrt = "|".join(pattern for name, pattern in isa.packed.items() if "sqrt" in name)
    for function, code in listing.items():
        # Every variant of the kernel must be vectorized, not only the first.
        if any(re.match(isa.other_sqrt, i) for i in code) and not any(
            re.match(packed_sqrt, i) for i in code
        ):
            yield f"no square root of full width in {function}"
        for reason, pattern in isa.forbidden.items():
            if found := [i for i in code if re.match(pattern, i)]:
                yield f"{reason} in {function}: {found[0]} ({len(found)} in all)"


def main() -> int:
    """Check every object and return 1 if one has errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objects", nargs="+", metavar="ISA=OBJECT")
    parser.add_argument("--nm", default="nm", help="for the objects' target")
    parser.add_argument("--objdump", default="objdump", help="for the objects' target")
    args = parser.parse_args()

    failed = False
    for argument in args.objects:
        name, _, path = argument.partition("=")
        if name not in INSTRUCTION_SETS or not Path(path).is_file():
            known = "|".join(INSTRUCTION_SETS)
            parser.error(f"objects must be named as {known}=FILE. Received: {argument}")
        problems = [
            *check_symbols(Path(path), args.nm),
            *check_instructions(Path(path), INSTRUCTION_SETS[name], args.objdump),
        ]
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        print(f"{name}: {'FAILED' if problems else 'ok'} ({path})")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
