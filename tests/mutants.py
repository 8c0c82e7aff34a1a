# SPDX-License-Identifier: MIT
"""Plant each of the listed mutants by itself, and record which test finds it.

    python tests/mutants.py --draw 450 --seed 1   # write the list, tests/mutants.jsonl
    python tests/mutants.py --draw 20 --only jax  # draw anew for these files
    python tests/mutants.py                       # test those that have no outcome yet
    python tests/mutants.py --all                 # test every mutant again, after tests have changed
    python tests/mutants.py --sample 20           # each 20th that was found must be found again

needs CMake, Ninja, GoogleTest, pybind11, coverage and what the tests need: tests that fail without a
mutant are left out. The list is written after each mutant, so an interrupted run can go on. A mutant
of C++ that cannot be compiled, or to the same code as before, is removed from the list.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple, TypeVar

from tqdm import tqdm

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from mutation import AREAS, SURVIVED, Mutant, drawn, statement_lines

LIST: Final = ROOT / "tests" / "mutants.jsonl"
CTEST: Final = "ctest"
PYTEST: Final = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
# Tests of other things than the package.
LEFT_OUT: Final = re.compile(r"tests/(bench|clients|cpp)/|test_(docs|examples)")
NO_MUTANT: Final = ("does not compile", "same code")
# Seconds of CPU time, with coverage, after which a process is killed and its file left out.
LONGEST: Final = 150
# What a busy machine may fail has to fail twice.
DOUBTFUL: Final = re.compile(r"(?i)process|thread|signal|fork|leak|distributed|time|_ends|memory")

T = TypeVar("T")
stopping = threading.Event()


class Usual(NamedTuple):
    """What a test file, or CTEST, does without a mutant: times in s, failures, lines run."""

    wall: float
    cpu: float
    failing: list[str]
    lines: dict[str, list[int]]


class Tree:
    """A copy of the project with its own build, in which mutants are planted."""

    def __init__(self, root: Path) -> None:
        self.root, self.scratch = root, root / "scratch"
        outer = ("FUSEDADAM_", "OMP_", "PYTHON", "PYTEST_", "HYPOTHESIS_", "COVERAGE_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)} | {
            "CCACHE_BASEDIR": str(root),
            "CCACHE_NOHASHDIR": "1",
            "CI": "1",  # derandomizes Hypothesis
            "MPLBACKEND": "Agg",
            "MUTANTS_TREE": str(root),  # marks the processes of this tree
            "PYTHONDONTWRITEBYTECODE": "1",  # an old .pyc could hide a mutant
            "PYTHONPATH": str(root / "src" / "python"),
            "TMPDIR": str(self.scratch),
        }
        # All files are new to Ninja, so that no object of an earlier mutant is kept.
        shutil.rmtree(root, ignore_errors=True)
        for path in tracked():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, root / path)
        pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"])
        configure = [
            *("cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            # The kernels have their own -O3. The rest compiles in two thirds of the time.
            *("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"),
            *("-DFUSEDADAM_TESTS=ON", "-DFUSEDADAM_PYTHON=ON"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.decode().strip()}",
        ]
        if shutil.which("ccache"):
            configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        for command in (configure, ["cmake", "--build", "build", "-j", "2"]):
            status, output, _, _ = self.run(command, 7200)
            if status != 0:
                raise SystemExit(output)
        (core,) = (root / "build").glob("_core*.so")
        self.core = root / "src" / "python" / "fusedadam" / core.name
        programs = (root / "build" / "tests" / "cpp").glob("fusedadam_*tests")
        # What is built for CTest and for pytest, by the names of the targets.
        self.products = {
            CTEST: {path.name: path for path in sorted(programs) if path.is_file()},
            "pytest": {"_core": core},
        }
        self.digests = {tests: self.built(tests) for tests in self.products}
        self.unchanged = core.read_bytes()
        self.core.write_bytes(self.unchanged)

    def run(
        self,
        command: list[str],
        limit: float,
        cpu_limit: float = 7200,
        coverage: Path | None = None,
        backend: str = "torch",
    ) -> tuple[int | None, str, float, float]:
        """Run a command and end what it leaves: its status, its output, and its times.

        The status is None if the command took longer than the limits.
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        variables = self.environment | {"KERAS_BACKEND": backend}
        if coverage:
            variables["COVERAGE_FILE"] = str(coverage)
        began = time.monotonic()
        with (self.scratch / "output").open("wb+") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            # Counts the time of an endless loop, whatever the load of the machine.
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(cpu_limit),) * 2)
            late = False
            try:
                while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                    late = late or time.monotonic() > began + limit
                    if late or stopping.is_set():
                        os.killpg(process.pid, signal.SIGKILL)
                    time.sleep(0.05)
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            process.returncode = os.waitstatus_to_exitcode(ended[1])
            # Tests start processes in sessions of their own.
            mark = f"MUTANTS_TREE={self.root}\0".encode()
            for environment in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if mark in environment.read_bytes():
                        os.kill(int(environment.parent.name), signal.SIGKILL)
            if stopping.is_set():
                raise KeyboardInterrupt
            output.seek(0)
            text = output.read().decode(errors="replace")
        cpu = ended[2].ru_utime + ended[2].ru_stime
        late = late or cpu >= cpu_limit
        return None if late else process.returncode, text, time.monotonic() - began, cpu

    def built(self, tests: str) -> str | None:
        """Build what these tests use; return a digest of it, or None if that fails."""
        targets = self.products[tests]
        command = ["cmake", "--build", "build", "-j", "1", "--target", *targets]
        if self.run(command, 7200)[0] != 0:
            return None
        return hashlib.sha256(b"".join(path.read_bytes() for path in targets.values())).hexdigest()

    @contextlib.contextmanager
    def with_planted(self, path: str, source: str) -> Iterator[None]:
        for cache in self.root.glob("src/python/**/__pycache__"):
            shutil.rmtree(cache)
        (self.root / path).write_text(source, encoding="utf-8")
        try:
            yield
        finally:
            shutil.copy(ROOT / path, self.root / path)
            self.core.write_bytes(self.unchanged)

    def measured(self, name: str) -> Usual | None:
        """Run a test file, or CTEST, without a mutant; return None if it cannot be used."""
        file, backend = file_and_backend(name)
        if name == CTEST:
            status, output, wall, cpu = self.run([CTEST, "--test-dir", "build"], 7200)
            return Usual(wall, cpu, failures(output), {})
        counts = self.root / "coverage"
        shutil.rmtree(counts, ignore_errors=True)
        coverage = [sys.executable, "-m", "coverage"]
        here = counts / "counts"
        command = [*PYTEST, file]
        status, output, wall, cpu = self.run(
            [*coverage, "run", *command], 7200, LONGEST, here, backend
        )
        if status not in (0, 1):
            return None
        self.run([*coverage, "combine", str(counts)], 1200, coverage=here)
        self.run(
            [*coverage, "json", "--fail-under=0", "-o", str(counts / "json")], 1200, coverage=here
        )
        if status == 1:  # perhaps because of coverage
            status, output, wall, cpu = self.run([sys.executable, *command], 7200, backend=backend)
        files = json.loads((counts / "json").read_text())["files"]
        lines = {path: file["executed_lines"] for path, file in files.items()}
        return Usual(wall, cpu, failures(output), lines)

    def found_by(self, name: str, usual: Usual) -> str:
        """The first test of a file, or of CTEST, that fails, or ""."""
        file, backend = file_and_backend(name)
        if name == CTEST:
            failing = "|".join(re.escape(test.removeprefix("ctest::")) for test in usual.failing)
            command = [CTEST, "--test-dir", "build", "--stop-on-failure", "-E", f"^({failing})$"]
        else:
            deselected = (f"--deselect={test}" for test in usual.failing)
            command = [sys.executable, *PYTEST, "-x", file, *deselected]
        for _ in range(2):
            limits = 60 + 10 * usual.wall, 60 + 10 * usual.cpu
            status, output, _, _ = self.run(command, *limits, backend=backend)
            if status == 0:
                return ""
            found = f"timeout: {file}" if status is None else next(iter(failures(output)), file)
            if not DOUBTFUL.search(found) and "Timeout" not in output:
                break
        return found.partition("[")[0].replace(file, name, 1)


def file_and_backend(name: str) -> tuple[str, str]:
    """A test file, and the backend of Keras on which it runs: "tests/keras/test_x.py@jax"."""
    file, _, backend = name.partition("@")
    return file, backend or "torch"


def tracked() -> list[str]:
    """The paths of the project's files."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


def failures(output: str) -> list[str]:
    """The failed tests that pytest or CTest lists."""
    pytest = re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*?)(?: - .*)?$", output, re.MULTILINE)
    ctest = re.findall(r"^\s+\d+ - (\S+) \(.*\)(?: .*)?$", output, re.MULTILINE)
    return pytest + [f"ctest::{test}" for test in ctest]


def file_of(mutant: Mutant) -> str:
    """The test file that found a mutant."""
    found_by: str = mutant.found_by
    return found_by.removeprefix("timeout: ").partition("::")[0]


def in_turn(trees: list[Tree], items: Iterable[T], work: Callable[[Tree, T], None]) -> None:
    """Do work on items, in all trees at once."""
    queue: SimpleQueue[T] = SimpleQueue()
    for item in items:
        queue.put(item)

    def work_in(tree: Tree) -> None:
        with contextlib.suppress(Empty):
            while True:
                work(tree, queue.get_nowait())

    with ThreadPoolExecutor(len(trees)) as pool:
        try:
            for future in [pool.submit(work_in, tree) for tree in trees]:
                future.result()
        except BaseException:
            stopping.set()
            raise


class Campaign:
    """The list of mutants, and what is known of the tests."""

    def __init__(self, listed: str, budget: float) -> None:
        self.mutants = {m.key: m for m in (Mutant(**json.loads(x)) for x in listed.splitlines())}
        self.budget, self.lock = budget, threading.Lock()
        self.usual: dict[str, Usual] = {}

    def save(self) -> None:
        partial = LIST.with_suffix(".partial")
        mutants = (self.mutants[key] for key in sorted(self.mutants))
        partial.write_text("".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in mutants))
        partial.replace(LIST)

    def measure(self, trees: list[Tree], work: Path, only: str) -> None:
        """Run the test files of this name without a mutant, unless that was done with these sources."""
        files = [p for p in tracked() if p.startswith(("src/", "tests/")) and "/muta" not in p]
        contents = hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in files))
        kept = work / f"usual-{contents.hexdigest()[:12]}.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        tests = [p for p in files if re.search(r"/test_\w+\.py$", p) and not LEFT_OUT.search(p)]
        tests += [f"{path}@jax" for path in tests if path.startswith("tests/keras/test_keras_")]

        def measure(tree: Tree, name: str) -> None:
            usual = tree.measured(name)
            with self.lock:
                known[name] = usual
                kept.write_text(json.dumps(known))
            tqdm.write(f"{usual.cpu:.0f} s: {name}" if usual else f"unusable: {name}")

        chosen = [CTEST, *(path for path in tests if re.search(only, path))]
        in_turn(trees, [name for name in chosen if name not in known], measure)
        self.usual = {name: Usual(*known[name]) for name in chosen if known[name]}
        for name in chosen:
            for test in self.usual[name].failing if name in self.usual else [name]:
                tqdm.write(f"LEFT OUT, fails without a mutant or takes too long: {test}")

    def ordered(self, mutant: Mutant, names: list[str]) -> list[str]:
        """What found this mutant before, then what costs little and finds many near it."""
        near: Counter[str] = Counter()
        for other in list(self.mutants.values()):
            near[file_of(other)] += 4 * (other.path == mutant.path) + (other.area == mutant.area)
        costs = {name: self.usual[name].cpu / (1 + near[name]) for name in names}
        first = dict.fromkeys((file_of(mutant), CTEST))
        chosen = [name for name in first if name in names]
        budget = self.budget
        for name in sorted(set(names) - first.keys(), key=lambda name: costs[name]):
            if self.usual[name].cpu <= budget:
                budget -= self.usual[name].cpu
                chosen.append(name)
        return chosen

    def outcome(self, tree: Tree, mutant: Mutant) -> str:
        """The test that finds a mutant, or SURVIVED, or one of NO_MUTANT."""
        source = (ROOT / mutant.path).read_text(encoding="utf-8")
        pytest = [name for name in self.usual if name != CTEST]
        with tree.with_planted(mutant.path, mutant.planted(source) or ""):
            if mutant.path.endswith(".py"):
                lines = statement_lines(source, mutant.line(source) or 0)
                ran = {name: self.usual[name].lines.get(mutant.path, ()) for name in pytest}
                names = [name for name in pytest if not lines.isdisjoint(ran[name])]
                return self.found_by(tree, mutant, names)
            outcome = NO_MUTANT[1]
            # The extension is built last, since that takes longest.
            for tests in sorted(tree.products, reverse=file_of(mutant) in pytest):
                digest = tree.built(tests)
                if digest is None:
                    return NO_MUTANT[0]
                if digest != tree.digests[tests]:
                    shutil.copy(tree.products["pytest"]["_core"], tree.core)
                    names = [CTEST] if tests == CTEST else pytest
                    outcome = self.found_by(tree, mutant, names)
                    if outcome != SURVIVED:
                        break
            return outcome

    def found_by(self, tree: Tree, mutant: Mutant, names: list[str]) -> str:
        tests = ((name, self.usual[name]) for name in self.ordered(mutant, names))
        return next(filter(None, (tree.found_by(*test) for test in tests)), SURVIVED)

    def test(self, trees: list[Tree], mutants: list[Mutant], done: Path) -> None:
        """Test these mutants, of all areas in turn, and list them in `done`."""
        with tqdm(total=len(mutants), unit="mutant", disable=None) as bar:

            def test(tree: Tree, mutant: Mutant) -> None:
                began = time.monotonic()
                found_by = self.outcome(tree, mutant)
                with self.lock, done.open("a") as log:
                    if found_by in NO_MUTANT:
                        del self.mutants[mutant.key]
                    else:
                        tested = dataclasses.replace(mutant, found_by=found_by)
                        self.mutants[mutant.key] = tested
                    self.save()
                    log.write(f"{mutant.key}\n")
                took = f"{time.monotonic() - began:.0f} s"
                tqdm.write(f"{found_by} ({took}): {mutant.key}")
                bar.update()

            mixed = sorted(mutants, key=lambda m: hashlib.sha256(m.key.encode()).digest())
            in_turn(trees, mixed, test)


def report(mutants: list[Mutant], sources: dict[str, str]) -> None:
    """Print what was found in each area, and the survivors; say which the committed list found."""
    tqdm.write(f"\n{'':30}  drawn  found  survived")
    for area in (*AREAS, ""):
        here = [mutant.found_by for mutant in mutants if mutant.area.startswith(area)]
        lived = here.count(SURVIVED)
        found = len(here) - lived - here.count("")
        tqdm.write(f"{area or 'all':30} {len(here):6} {found:6} {lived:9}")
    command = ["git", "show", f"HEAD:{LIST.relative_to(ROOT)}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    before = Campaign(shown.stdout, 0).mutants
    for mutant in mutants:
        if mutant.found_by == SURVIVED:
            was = before[mutant.key].found_by if mutant.key in before else ""
            place = f"{mutant.path}:{(mutant.line(sources[mutant.path]) or 0) + 1}"
            tqdm.write(
                f"survived: {place}: {mutant.old} -> {mutant.new}"
                + (f" (found before, by {was})" if was not in ("", SURVIVED) else "")
            )


def main() -> None:
    """Draw or test mutants."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "--draw", type=int, metavar="COUNT", help="write a new list, of files with PART, and end"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="of path or line")
    parser.add_argument("--sample", type=int, metavar="N", help="each Nth of those that were found")
    parser.add_argument("--again", action="store_true", help="also those that survived")
    parser.add_argument("--all", action="store_true", help="also those that were found")
    budget = "seconds of pytest, besides the file that found it before, for one mutant"
    parser.add_argument("--budget", type=float, default=float("inf"), help=budget)
    parser.add_argument("--tests", default="", metavar="REGEX", help="paths of test files to run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(LIST.read_text() if LIST.exists() else "", args.budget)
    if args.draw:
        known, new = campaign.mutants, drawn(ROOT, args.draw, args.seed, args.only)
        others = (m for m in known.values() if not any(part in m.path for part in args.only))
        campaign.mutants = {m.key: known.get(m.key, m) for m in (*new, *others)}
        campaign.save()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A mutant may ask for any amount of memory.
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, 16 << 30)):
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
    files = {ROOT / mutant.path for mutant in campaign.mutants.values()}
    sources = {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in files if f.exists()}
    present = []
    for mutant in campaign.mutants.values():
        if mutant.line(sources.get(mutant.path, "")) is None:
            tqdm.write(f"gone: {mutant.key}")
        else:
            present.append(mutant)
    # What --all has tested before it was interrupted.
    done = work / ("all.txt" if args.all else "tested.txt")
    tested = set(done.read_text().splitlines()) if args.all and done.exists() else set()
    wanted = {"", SURVIVED} if args.again else {""}
    chosen = [m for m in present if m.found_by in wanted or (args.all and m.key not in tested)]
    chosen = [m for m in chosen if any(part in m.key for part in args.only)]
    if args.sample:
        chosen = [m for m in present if m.found_by not in ("", SURVIVED)][:: args.sample]
        args.tests, campaign.budget = "|".join(re.escape(file_of(m)) for m in chosen), 0
    if chosen:
        trees = [Tree(work / str(number)) for number in range(args.workers)]
        campaign.measure(trees, work, args.tests)
        campaign.test(trees, chosen, done)
        done.unlink()
    keys = {mutant.key for mutant in present}
    report([mutant for key, mutant in campaign.mutants.items() if key in keys], sources)
    survivors = {m.key for m in campaign.mutants.values() if m.found_by == SURVIVED}
    if args.sample and not (chosen and survivors.isdisjoint(m.key for m in chosen)):
        raise SystemExit("there are no mutants that were found before, or not all are found again")


if __name__ == "__main__":
    main()
