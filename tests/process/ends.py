# SPDX-License-Identifier: MIT
"""Processes that exit while threads are inside a call."""

from __future__ import annotations

import os

from fresh_python import run_python

# The number of processes for each kind of call.
ENDS = int(os.environ.get("FUSEDADAM_ENDS", "1"))

# Nobody joins daemon threads. The interpreter takes longer to shut down than the threads take for a
# call, so each thread requests the GIL meanwhile.
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
    """Threads call what `prepared()` of `setup` returns while the main thread exits."""
    for _ in range(ENDS):
        done = run_python(SCRIPT.format(setup=setup, threads=threads, end=end))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
