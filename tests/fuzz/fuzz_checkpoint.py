# SPDX-License-Identifier: MIT
"""Run libFuzzer on the checkpoint reader, guided by the branches of its Python code.

    python tests/fuzz/fuzz_checkpoint.py            for FUSEDADAM_FUZZ_SECONDS, default 10
    python tests/fuzz/fuzz_checkpoint.py FILE...    to repeat what a run found

Needs atheris, which includes libFuzzer (3.0 for Python 3.11 to 3.13). Prints what was tried and
fails if that is nothing. A failing file is left in the working directory.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

LONGEST = 20_000
# Some thousand times longer than a file takes.
SECONDS_PER_FILE = 10
# Enough for a process with NumPy and libFuzzer's tables, but not for a header or array with a false
# size.
MEMORY_MB = 600
# In memory if possible: the disk would take half of the time.
FOLDERS = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
RUNNING = "_FUSEDADAM_FUZZ_FOLDER"


def fuzz(folder: Path) -> None:
    """Let libFuzzer try files until it ends the process."""
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["fusedadam.checkpoint", "fusedadam.tensor_file"]):
        import fusedadam.checkpoint
        import fusedadam.tensor_file  # noqa: F401
    from fuzz_checkpoint_files import loads, mutated

    def mutate_bytes(content: bytes, _: random.Random) -> bytes:
        changed: bytes = atheris.Mutate(content, len(content) + 20)
        return changed

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        return mutated(content, random.Random(seed), mutate_bytes)[:longest]

    atheris.Setup(
        sys.argv, lambda content: loads(folder / "file", content) and None, custom_mutator=mutate
    )
    atheris.Fuzz()


def run(folder: Path, seconds: int) -> None:
    """Fuzz in a separate process, which libFuzzer ends, and print the outcome."""
    from fuzz_checkpoint_files import loads, seeds

    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate(seeds(folder)):
        (corpus / f"seed{i}").write_bytes(content)
    options = [
        *(f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-len_control=0"),
        *(f"-timeout={SECONDS_PER_FILE}", f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1"),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, *options, str(corpus)],
        env=os.environ | {RUNNING: str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    tried = re.search(r"^stat::number_of_executed_units: *(\d+)", done.stdout, re.MULTILINE)
    features = re.findall(r" ft: (\d+)", done.stdout)
    if done.returncode or tried is None or int(tried[1]) == 0 or not features:
        sys.stdout.write(done.stdout[-20_000:])
        raise SystemExit(f"The fuzzer failed, with exit status {done.returncode}.")
    kept = [file.read_bytes() for file in corpus.iterdir()]
    load = sum(loads(folder / "file", content) for content in kept)
    sys.stdout.write(
        f"fuzz_checkpoint: {int(tried[1]):,} files tried in {seconds} s, {features[-1]} features, "
        f"{len(kept)} files kept, of which {load} load\n"
    )


def repeat(folder: Path, files: list[str]) -> None:
    from fuzz_checkpoint_files import loads

    for file in files:
        loaded = loads(folder / "file", Path(file).read_bytes())
        sys.stdout.write(f"{file} {'loads' if loaded else 'is refused'}\n")


if __name__ == "__main__":
    if RUNNING in os.environ:
        fuzz(Path(os.environ[RUNNING]))
    else:
        with tempfile.TemporaryDirectory(dir=FOLDERS) as name:
            if sys.argv[1:]:
                repeat(Path(name), sys.argv[1:])
            else:
                run(Path(name), int(os.environ.get("FUSEDADAM_FUZZ_SECONDS", "10")))
