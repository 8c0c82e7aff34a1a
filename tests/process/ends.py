# SPDX-License-Identifier: MIT
"""Processes that end while threads are within a call."""

from __future__ import annotations

import os

from fresh_python import run_python

# Processes for each kind of call.
ENDS = int(os.environ.get("FUSEDADAM_ENDS", "3"))

# Nobody waits for daemon threads. To end takes the interpreter longer than they take for a call, so
# that each wants the GIL meanwhile.
SCRIPT = """
import threading, time
{setup}
begun = threading.Semaphore(0)

def work():
    call = prepared()
    begun.release()
    while True:
        call()

for _ in range({threads}):
    threading.Thread(target=work, daemon=True).start()
for _ in range({threads}):
    begun.acquire()
time.sleep(0.05)
{end}
"""


def assert_ends_well(setup: str, *, threads: int = 1, end: str = "") -> None:
    """Whatever `prepared()` of `setup` returns is called by threads when the main thread ends."""
    for _ in range(ENDS):
        done = run_python(SCRIPT.format(setup=setup, threads=threads, end=end))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
