# SPDX-License-Identifier: MIT
"""Ctrl-C at every instant of a call at which Python can raise it.

Python runs signal handlers at the start of a function, after a call and at a backward jump, but not
within compiled code. A trace function sees every bytecode instruction, so it can raise
`KeyboardInterrupt` at each of these instants.
"""

from __future__ import annotations

import collections
import contextvars
import dis
import gc
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import autograd
import pytest

# Longer than any of these calls. One that takes longer waits for a lock that is never released.
_TIME_LIMIT_S = 60

# Excluded: the interrupting code itself, and autograd, which swallows exceptions.
_NOT_INTERRUPTED = (str(Path(__file__).parent), str(Path(autograd.__file__).parent))

# Python handles signals after these and at the start of a function. POP_JUMP_* is for Python 3.10.
_LOOKS_FOR_SIGNALS = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "POP_JUMP", "RESUME")
_BUT_NOT_AFTER = "CALL_INTRINSIC"


class _Interrupter:
    """A trace function that raises at the first instant not seen before."""

    def __init__(self, seen: set[Any], times: int, not_within: tuple[str, ...]) -> None:
        self._not_within = _NOT_INTERRUPTED + not_within
        self._seen = seen
        self._most = times
        self._times: collections.Counter[tuple[types.CodeType, int]] = collections.Counter()
        self.where = ""
        # For each frame, whether Python checks for signals before its next instruction.
        self.looks: dict[types.FrameType, bool] = {}

    def __call__(self, frame: types.FrameType, event: str, _argument: Any) -> Any:
        code = frame.f_code
        if self.where or code.co_filename.startswith(self._not_within) or _is_callback(code):
            return None
        frame.f_trace_opcodes = True
        if event == "call":
            self.looks[frame] = True
        elif event == "exception":
            # Python does not check on the way to an `except` clause. An exception raised there
            # would leave the first one set as the one being handled.
            self.looks[frame] = False
        elif event == "opcode":
            looks = self.looks.get(frame, True)
            opcode = dis.opname[code.co_code[frame.f_lasti]]
            looks_next = opcode.startswith(_LOOKS_FOR_SIGNALS)
            self.looks[frame] = looks_next and not opcode.startswith(_BUT_NOT_AFTER)
            if looks:
                place = code, frame.f_lasti
                self._times[place] += 1
                instant = place, min(self._times[place], self._most)
                if instant not in self._seen:
                    self._seen.add(instant)
                    self.where = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
                    raise KeyboardInterrupt
        return self


def _is_callback(code: types.CodeType) -> bool:
    """Whether this is a weak reference callback, whose exceptions Python only reports."""
    return code.co_name == "_remove" and code.co_filename.endswith("_weakrefset.py")


def interrupted(
    call: Callable[[], object], seen: set[Any], times: int, not_within: tuple[str, ...] = ()
) -> str:
    """Interrupt a call at a new instant and return where that was, or "" if none is left."""
    interrupter = _Interrupter(seen, times, not_within)
    before = sys.gettrace()
    context = dict(contextvars.copy_context())
    # Python 3.12 traces opcodes only if a frame has asked for it before.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(interrupter)
    try:
        call()
    except KeyboardInterrupt:
        assert interrupter.where
        return interrupter.where
    finally:
        sys.settrace(before)
        interrupter.looks.clear()  # a reference cycle, which would keep the call's objects alive
        assert dict(contextvars.copy_context()) == context, f"set after {interrupter.where}"
    assert not interrupter.where, f"an interrupt was lost at {interrupter.where}"
    return ""


class Case(Protocol):
    """A call to interrupt, on its own objects, which are the same each time."""

    def call(self) -> object: ...

    # Everything that the call may change, in a form that can be compared.
    def observe(self) -> object: ...

    # What follows the call, and must find everything in order.
    def go_on(self) -> object: ...


def interrupt_everywhere(
    make: Callable[[], Case], *, times: int = 3, not_within: tuple[str, ...] = ()
) -> int:
    """Interrupt a call at each of its instants, then continue. Return the number of instants.

    A function that runs repeatedly is interrupted this many times. Functions in the files of
    `not_within` are not interrupted.

    The call must have taken effect as a whole or not at all, and what follows must behave
    accordingly. It runs on another thread, which would block on a lock that is still held.
    """
    done, undone, done_and_on, undone_and_on = (make() for _ in range(4))
    before = undone.observe()
    for calls in ([done.call], [undone_and_on.go_on], [done_and_on.call, done_and_on.go_on]):
        for call in calls:
            call()
    after, before_and_on, after_and_on = (
        case.observe() for case in (done, undone_and_on, done_and_on)
    )

    gc.collect()
    gc.disable()  # finalizers would run at other instants each time
    try:
        seen: set[Any] = set()
        while True:
            case = make()
            where = interrupted(case.call, seen, times, not_within)
            found = case.observe()
            what = f"interrupt {len(seen)}, at {where}"
            if not where:
                assert found == after
                return len(seen)
            assert found in (before, after), f"half done after {what}"
            _in_another_thread(case.go_on, what)
            expected = before_and_on if found == before else after_and_on
            assert case.observe() == expected, f"it goes on wrongly after {what}"
    finally:
        gc.enable()


def _in_another_thread(call: Callable[[], object], what: str) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 (reported to the caller)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_TIME_LIMIT_S)
    if thread.is_alive():
        pytest.fail(f"a lock is still held after {what}")
    assert not errors, f"{errors[0]!r} after {what}"
