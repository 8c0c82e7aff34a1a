# SPDX-License-Identifier: MIT
"""Out of memory, a call raises MemoryError and has changed nothing.

`tests/cpp/memory/test_out_of_memory.cpp` lets every single allocation of the core fail. Here the system
refuses memory, as with `ulimit -v`.
"""

from __future__ import annotations

import json
import logging
import sys

import pytest
from fresh_python import output_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

# Makes malloc request every larger allocation from the system.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def test_out_of_memory() -> None:
    code = """
        import json, memory_limit
        print(json.dumps(memory_limit.exhaust_all()))
    """
    failures = json.loads(output_of(code, environment=_ENVIRONMENT))
    logging.getLogger(__name__).info("failures of each call: %s", failures)
    assert sum(failures.values()) > 20


@pytest.mark.parametrize("threads", ["2", "8"])
def test_threads_that_cannot_be_started(threads: str) -> None:
    # libgomp would end the process. 8 threads have stacks of about 64 MiB; nothing else needs much.
    code = """
        import fusedadam, numpy as np
        from helpers import assert_all_same_bits
        from memory_limit import MIB, limited

        threads = fusedadam.get_num_threads()
        arrays, serial = ([np.linspace(0, i, 1 << 18) for i in range(4)] for _ in range(2))
        for step, more in enumerate((0, MIB, 8 * MIB, 24 * MIB, 4096 * MIB), 1):
            with limited(more):
                fusedadam.adam_step(*arrays, step=step)
            fusedadam.set_num_threads(1)
            fusedadam.adam_step(*serial, step=step)
            fusedadam.set_num_threads(threads)
            assert_all_same_bits(arrays, serial)
    """
    output_of(code, environment={"OMP_NUM_THREADS": threads})
