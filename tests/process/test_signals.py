# SPDX-License-Identifier: MIT
"""Ctrl-C at any time: a call takes effect or does not, and the next call finds all in order."""

from __future__ import annotations

import ast
import dis
import json
import logging
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import fusedadam
import pytest
from calls import CALLS, Scene
from fresh_python import NO_COVERAGE, output_of
from fusedadam import locks
from interrupts import Case, interrupt_everywhere

PACKAGE = Path(fusedadam.__file__).parent

# The number of real signals for each kind of call.
INTERRUPTS = int(os.environ.get("FUSEDADAM_INTERRUPTS", "4"))
FILES = ("save", "load", "load in place")
# The trace function raises an instruction later than Python would: here, after the `with` block.
LATER = ("get_weights",)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


# Files that were not closed are closed when they are freed.
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in LATER])
def test_a_call_is_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "save" and sys.platform == "win32":
        pytest.skip("files that are open cannot be replaced there")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Hundreds of files, which must not wait for the disk.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    Scene(CALLS[name]).go_on()
    before = open_files()
    times, least = (1, 50) if name in FILES else (2, 2)
    assert interrupt_everywhere(lambda: Scene(CALLS[name]), times=times) > least
    if name != "save":
        # At most one: an interrupt can arrive before Python has the descriptor of a file that it
        # has opened.
        assert open_files() <= before + 1


class Fork(Case):
    """The hooks that lock around a fork, before it and after it in both processes."""

    def __init__(self) -> None:
        self.locks: list[Any] = [locks.new_lock() for _ in range(3)]

    def call(self) -> object:
        # Each hook runs twice, as registered. As Python does, this ignores an exception of a hook
        # until all hooks have run.
        interrupted = False
        for hook in (locks._acquire_all,) * 2 + (locks._release_all,) * 2:
            try:
                hook()
            except KeyboardInterrupt:
                interrupted = True
            if hook is locks._acquire_all:
                held = list(locks._held.locks)
        assert {id(lock) for lock in self.locks} <= {id(lock) for lock in held}
        if interrupted:
            raise KeyboardInterrupt
        return None

    def go_on(self) -> object:
        for lock in [*self.locks, locks._registry]:
            assert lock.acquire(timeout=5)
            lock.release()
        return None

    def observe(self) -> object:
        return list(locks._held.locks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")
def test_an_interrupted_fork_holds_all_locks_and_lets_go_of_them() -> None:
    assert interrupt_everywhere(Fork) > 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("kind", ["large", "many", "loss", "sparse", "stateless", "files"])
def test_ctrl_c(kind: str) -> None:
    code = f"""
        import json, ctrl_c
        print(json.dumps(ctrl_c.interrupt({kind!r}, {INTERRUPTS})))
    """
    # Coverage waits for its own lock forever once an interrupt has come between acquiring it and
    # releasing it.
    seen = json.loads(output_of(code, environment=NO_COVERAGE))
    logging.getLogger(__name__).info("%s: %s", kind, seen)
    assert seen["within a call"] >= INTERRUPTS


# Comprehensions are functions of their own before Python 3.12.
LOOPS: tuple[type[ast.stmt | ast.expr], ...] = (ast.For, ast.While)
if sys.version_info >= (3, 12):
    LOOPS += (ast.ListComp, ast.SetComp, ast.DictComp)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no exception tables")
@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_an_interrupt_of_a_loop_ends_the_block_around_it(file: Path) -> None:
    """Python's compiler leaves some jumps of a loop with branches outside of its `with` or `try`.

    An interrupt there would keep a lock. Such a loop belongs into a function.
    """
    source = file.read_text(encoding="utf-8")
    jumps: set[int] = set()
    codes = [compile(source, file.name, "exec")]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        entries: Any = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
        for instruction in dis.get_instructions(code):
            line: int | None = instruction.positions.lineno  # type: ignore[attr-defined]
            handled = any(entry.start <= instruction.offset < entry.end for entry in entries)
            if instruction.opname == "JUMP_BACKWARD" and line and not handled:
                jumps.add(line)
    outside = [
        (line, block.lineno)
        for block in ast.walk(ast.parse(source))
        if isinstance(block, (ast.With, ast.Try))
        for statement in block.body
        for loop in ast.walk(statement)
        if isinstance(loop, LOOPS)
        for line in jumps & {*range(loop.lineno, (loop.end_lineno or 0) + 1)}
    ]
    assert outside == []
