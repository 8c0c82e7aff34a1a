# SPDX-License-Identifier: MIT
"""The floating-point state of the calling thread: rounding, flushing, traps, exception flags.

Uses glibc's `fegetenv` and `fesetenv`, whose `fenv_t` has the layouts below.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest


class _Layout(NamedTuple):
    words: int
    # The words with the control bits and the exception flags, and the masks of the relevant bits.
    control: int
    flags: int
    all_flags: int
    modes: dict[str, int]
    traps: int
    has_x87: bool


_LAYOUTS = {
    # 28 bytes of x87 state, then MXCSR: flags 0-5, DAZ 6, trap masks 7-12, rounding 13-14, FTZ 15
    # (Intel SDM, volume 1, section 10.2.3).
    "x86_64": _Layout(
        words=8,
        control=7,
        flags=7,
        all_flags=0x3F,
        modes={
            "upward": 2 << 13,
            "downward": 1 << 13,
            "to zero": 3 << 13,
            "flush": 1 << 15 | 1 << 6,
        },
        traps=0x3F << 7,
        has_x87=True,
    ),
    # FPCR: rounding 22-23, FZ 24. FPSR: flags 0-4. Traps are optional, and no server CPU has them.
    "aarch64": _Layout(
        words=2,
        control=0,
        flags=1,
        all_flags=0x1F,
        modes={"upward": 1 << 22, "downward": 2 << 22, "to zero": 3 << 22, "flush": 1 << 24},
        traps=0,
        has_x87=False,
    ),
}
_LAYOUT = _LAYOUTS.get(platform.machine())

needs_fenv = pytest.mark.skipif(
    _LAYOUT is None or platform.libc_ver()[0] != "glibc",
    reason="knows the layout of glibc's fenv_t only",
)

MODES: list[tuple[str, ...]] = [
    ("upward",),
    ("downward",),
    ("to zero",),
    ("flush",),
    ("upward", "flush"),
]

# x87 control word: all traps off, single precision, rounding up (Intel SDM, volume 1, section
# 8.1.5). A step that used the x87 FPU would show it.
_X87_MASKS, _X87_SINGLE, _X87_EXTENDED, _X87_UPWARD = 0x3F, 0x000, 0x300, 2 << 10


class State(NamedTuple):
    """The state that a call must preserve."""

    control: int
    flags: int
    x87_control: int
    x87_flags: int


class Processor:
    """The state of the thread that calls these methods."""

    def __init__(self) -> None:
        assert _LAYOUT is not None
        self._layout = _LAYOUT
        # PyDLL keeps the GIL, so that no other Python thread runs in between.
        self._libm = ctypes.PyDLL("libm.so.6")
        self._words = ctypes.c_uint32 * _LAYOUT.words
        self._saved = self._get()

    def _get(self) -> list[int]:
        words = self._words()
        assert self._libm.fegetenv(words) == 0
        return list(words)

    def set(self, *modes: str, raised: bool = False, traps: bool = False) -> None:
        """Set these modes, every exception flag or none, and every trap or the previous ones."""
        layout, words = self._layout, list(self._saved)
        words[layout.control] |= sum(layout.modes[mode] for mode in modes)
        words[layout.flags] &= ~layout.all_flags
        if raised:
            words[layout.flags] |= layout.all_flags
        if traps:
            words[layout.control] &= ~layout.traps
        if layout.has_x87:
            masks = 0 if traps else _X87_MASKS
            words[0] = masks | ((_X87_UPWARD | _X87_SINGLE) if modes else _X87_EXTENDED)
        assert self._libm.fesetenv(self._words(*words)) == 0

    def state(self) -> State:
        layout, words = self._layout, self._get()
        both = layout.control == layout.flags
        control = words[layout.control] & ~(layout.all_flags if both else 0)
        flags = words[layout.flags] & layout.all_flags
        x87 = (words[0] & 0xFFFF, words[1] & 0x3F) if layout.has_x87 else (0, 0)
        return State(control, flags, *x87)

    def restore(self) -> None:
        assert self._libm.fesetenv(self._words(*self._saved)) == 0


@contextmanager
def processor_restored() -> Iterator[Processor]:
    """Yield the state of this thread and restore it at the end.

    The garbage collector is disabled: finalizers may compute and raise flags.
    """
    processor = Processor()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield processor
    finally:
        processor.restore()
        if collects:
            gc.enable()
