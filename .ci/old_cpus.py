# SPDX-License-Identifier: MIT
"""Check in QEMU that older CPUs get the same bits and no illegal instruction.

Run this in an environment with the wheel:

    python .ci/old_cpus.py AARCH64 build/release/tests/cpp/fusedadam_tests GTEST_FILTER

On each CPU model, `python -m fusedadam check` must find the instruction sets of that model, and the
published bits with each. `import` must refuse a FUSEDADAM_ISA that the model lacks. On the oldest
model, where NumPy does not run, the C++ tests run instead. AARCH64 is the directory of
`aarch64_python.sh`, with a Python for AArch64, which must find the same.

The emulator itself is checked first: on each model, a program with a single newer instruction must be
killed if the model lacks the instruction, and must run otherwise.

Needs Debian's packages gcc, libc6-dev and qemu-user, and NumPy before 2.4, which runs on x86-64
without SSE4.2.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CHECK = ("-m", "fusedadam", "check", "--threads", "2")

# One instruction of each extension, oldest first.
INSTRUCTIONS = {
    "sse2": "paddd %xmm0, %xmm0",
    "sse3": "addsubps %xmm0, %xmm0",
    "ssse3": "pabsb %xmm0, %xmm0",
    "sse4.2": "pcmpgtq %xmm0, %xmm0",
    "avx": "vxorps %ymm0, %ymm0, %ymm0",
    "avx2": "vpaddd %ymm0, %ymm0, %ymm0",
    "avx512": "vpaddd %zmm0, %zmm0, %zmm0",
}


class Cpu(NamedTuple):
    """A QEMU CPU model, the last of INSTRUCTIONS that it executes, and the expected instruction sets."""

    model: str
    executes: str
    isas: tuple[str, ...] = ("baseline",)
    runs_numpy: bool = True


CPUS = [
    # The x86-64 baseline.
    Cpu("kvm64,-sse3", "sse2", runs_numpy=False),
    Cpu("Opteron_G1", "sse3"),
    Cpu("Nehalem", "sse4.2"),
    Cpu("SandyBridge", "avx"),
    # CPUID reports AVX and AVX2, but the operating system has not enabled their registers.
    Cpu("Haswell,-xsave", "sse4.2"),
    Cpu("Haswell", "avx2", ("avx2", "baseline")),
]


def run(
    *command: str | Path, cpu: Cpu | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program on an emulated CPU, or on this one if `cpu` is None."""
    emulator = ["qemu-x86_64", "-cpu", cpu.model] if cpu else []
    # OPENBLAS_CORETYPE makes NumPy's OpenBLAS ignore the features of the model.
    not_inherited = ("FUSEDADAM_", "OPENBLAS_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(not_inherited)}
    return subprocess.run(
        [*emulator, *command],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=600,  # about 10 s on an idle machine
        check=False,
    )


def last_line(text: str) -> str:
    """Return the last line, which is the message of a traceback."""
    return text.strip().rpartition("\n")[2]


def emulator_problems(cpu: Cpu) -> Iterator[str]:
    """Yield instructions that the emulator wrongly executes or refuses."""
    names = list(INSTRUCTIONS)
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "program")
        for i, name in enumerate(names):
            code = f'int main(void) {{ __asm__ volatile("{INSTRUCTIONS[name]}"); }}'
            subprocess.run(
                ["gcc", "-x", "c", "-", "-o", program], input=code, text=True, check=True
            )
            status = run(program, cpu=cpu).returncode
            if status != (0 if i <= names.index(cpu.executes) else -signal.SIGILL):
                yield f"the emulator's {name} instruction ends with status {status}"


def differences(done: subprocess.CompletedProcess[str], isas: Sequence[str]) -> Iterator[str]:
    """Yield how a check failed, or found other instruction sets than those expected."""
    expected = f"instruction sets: {', '.join(isas)} (active: {isas[0]})\n"
    if done.returncode or not done.stdout.startswith(expected):
        yield f"status {done.returncode}: {done.stdout}{last_line(done.stderr)}"


def python_problems(cpu: Cpu) -> Iterator[str]:
    """Yield differences on this CPU."""
    yield from differences(run(sys.executable, *CHECK, cpu=cpu), cpu.isas)
    for isa in {"avx512", "avx2"}.difference(cpu.isas):
        done = run(sys.executable, "-c", "import fusedadam", cpu=cpu, FUSEDADAM_ISA=isa)
        message = (
            "ImportError: FUSEDADAM_ISA must name an instruction set that this build and this CPU "
            f"support ({', '.join(cpu.isas)}). Received: '{isa}'"
        )
        if done.returncode != 1 or last_line(done.stderr) != message:
            yield f"FUSEDADAM_ISA={isa}: status {done.returncode}, {last_line(done.stderr)}"


def aarch64_problems(work: Path) -> Iterator[str]:
    """Yield differences on AArch64."""
    root = work.resolve() / "root"
    python = ["qemu-aarch64", "-L", root, root / "usr/bin/python3"]
    yield from differences(run(*python, *CHECK, PYTHONPATH=str(work.resolve() / "site")), ["neon"])


def test_problems(cpu: Cpu, tests: str, test_filter: str) -> Iterator[str]:
    """Yield failures of the C++ tests on this CPU."""
    isas = ",".join(cpu.isas)
    done = run(tests, f"--gtest_filter={test_filter}", cpu=cpu, FUSEDADAM_EXPECTED_ISAS=isas)
    if done.returncode or "[  PASSED  ]" not in done.stdout:
        yield f"the C++ tests end with status {done.returncode}:\n{done.stdout}{done.stderr}"


def main() -> int:
    """Check all CPUs; return 1 if there are problems."""
    aarch64, tests, test_filter = sys.argv[1:]
    here = run(sys.executable, *CHECK[:3])
    print(f"this machine: {here.stdout}{here.stderr}")

    def problems_of(cpu: Cpu) -> list[str]:
        found = python_problems(cpu)
        if not cpu.runs_numpy:
            found = test_problems(cpu, tests, test_filter)
        return [*emulator_problems(cpu), *found]

    found = {"this machine": [""] * here.returncode}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found |= zip((cpu.model for cpu in CPUS), pool.map(problems_of, CPUS), strict=True)
    found["aarch64"] = list(aarch64_problems(Path(aarch64)))
    for name, problems in found.items():
        print(f"{name}: {'; '.join(problems) or 'passed'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
