# SPDX-License-Identifier: MIT
"""The guards themselves: overruns fault, and overwritten canaries are found."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path

import guarded
import numpy as np
import pytest
from fresh_python import run_python
from guarded import PLACES, Guarded, Place

PROLOGUE = f"""
import sys
sys.path.insert(0, {str(Path(guarded.__file__).parent)!r})
from ctypes import memset, string_at
import numpy as np
from guarded import Guarded
a = Guarded(np.zeros(1025, "float32"), PLACE).array
a[0] = a[-1] + 1  # the first and the last element are there
print("reached", flush=True)
"""
ACCESSES = {
    "read behind the end": ("end", "print(string_at(a.ctypes.data + a.nbytes, 1))"),
    "write behind the end": ("end", "memset(a.ctypes.data + a.nbytes, 0, 1)"),
    "read before the start": ("start", "print(string_at(a.ctypes.data - 1, 1))"),
    "write before the start": ("start", "memset(a.ctypes.data - 1, 0, 1)"),
    # What a kernel with an off-by-one error would do.
    "a step of one element too many": (
        "end",
        """
        import fusedadam
        longer = np.lib.stride_tricks.as_strided(a, (a.size + 1,))
        fusedadam.adam_step(longer, *(np.zeros(a.size + 1, a.dtype) for _ in range(3)), step=1)
        """,
    ),
}


@pytest.mark.skipif(not guarded.PROTECTS, reason="no memory is protected on Windows")
@pytest.mark.parametrize(("place", "code"), ACCESSES.values(), ids=ACCESSES)
def test_one_byte_too_far_faults(place: str, code: str) -> None:
    done = run_python(PROLOGUE.replace("PLACE", repr(place)) + textwrap.dedent(code))
    assert done.stdout.strip() == "reached", done.stderr
    # macOS reports the same fault as SIGBUS.
    assert done.returncode in {-signal.SIGSEGV, -signal.SIGBUS}


@pytest.mark.parametrize("place", PLACES)
def test_canary_tells_of_a_write_on_the_side_that_is_open(place: Place) -> None:
    held = Guarded(np.zeros(3, "float32"), place)
    held.assert_canaries_alive()
    held._bytes[held._start - 1 if place == "end" else held._stop] = 0
    with pytest.raises(AssertionError, match="before the" if place == "end" else "past the"):
        held.assert_canaries_alive()
