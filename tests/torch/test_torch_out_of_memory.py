# SPDX-License-Identifier: MIT
"""`fusedadam.torch` out of memory: an exception, and nothing has changed."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest
from fresh_python import output_of

torch: Any = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

# torch's allocator, which copies gradients and creates late averages, raises RuntimeError. The
# core's allocations raise MemoryError.
_CODE = """
    import json
    import fusedadam.torch, torch
    from interrupts import Case
    from memory_limit import MIB, exhaust

    class Steps(Case):
        def __init__(self, steps=0, strided=False, **options):
            ascending = torch.arange(MIB // 4, dtype=torch.float32).reshape(512, -1)
            self.param = torch.nn.Parameter(ascending / 7)
            self.param.grad = (ascending / 3).T.contiguous().T if strided else ascending / 3
            self.optimizer = fusedadam.torch.Adam([self.param], **options)
            for _ in range(steps):
                self.optimizer.step()

        def call(self):
            return self.optimizer.step()

        go_on = call

        def observe(self):
            state = self.optimizer.state.get(self.param, {})
            tensors = [self.param.detach(), *(state[name] for name in sorted(state))]
            return [t.numpy().tobytes() for t in tensors]

    class Late(Steps):
        def __init__(self):
            super().__init__(1)
            self.optimizer.param_groups[0]["ema_decay"] = 0.9

    class Swap(Steps):
        def __init__(self):
            super().__init__(2, ema_decay=0.9)

        def call(self):
            return self.optimizer.swap_ema()

        def go_on(self):
            self.optimizer.swap_ema()
            return self.optimizer.step()

    errors = (MemoryError, RuntimeError)
    print(json.dumps({
        "first step": exhaust(Steps),
        "first step, more state": exhaust(lambda: Steps(amsgrad=True, ema_decay=0.9)),
        "gradient that is copied": exhaust(lambda: Steps(1, strided=True), errors),
        "averages that begin": exhaust(Late, errors),
        "swap_ema": exhaust(Swap, errors),
    }))
"""


def test_out_of_memory() -> None:
    failures = json.loads(output_of(_CODE, environment=_ENVIRONMENT))
    logging.getLogger(__name__).info("failures of each call: %s", failures)
    assert all(failures.values())
