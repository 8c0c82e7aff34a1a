# SPDX-License-Identifier: MIT
"""Interpreter exit while threads step: the process ends as it would without them."""

from __future__ import annotations

import pytest
from ends import assert_ends_well

LARGE = """
import numpy as np
import fusedadam
from fusedadam import Adam, adam_step

p, g, m, v = np.full((4, 300_000, 10), 0.5, "float32")
rows = np.arange(len(p))
shared = Adam()

def prepared():
    adam, clipping, averaging = Adam(), Adam(clipnorm=1.0), Adam(use_ema=True)
    averaging.build([p])
    return lambda: {call}
"""


@pytest.mark.parametrize(
    "call",
    [
        "adam.apply_gradients([(g, p)])",
        "adam.get_updates([g], [p])",
        "adam.apply_sparse(rows, g, p)",
        "adam.build([p])",
        "averaging.swap_ema()",
        "clipping.get_gradients([g], [p])",
        "adam_step(p, g, m, v, step=1)",
        "fusedadam.global_norm([g])",
    ],
)
def test_within_a_call(call: str) -> None:
    assert_ends_well(LARGE.format(call=call))


def test_within_the_calls_of_several_threads() -> None:
    assert_ends_well(LARGE.format(call="shared.get_updates([g], [p])"), threads=3)


@pytest.mark.parametrize(
    "end",
    [
        "import sys; threading.Thread(target=sys.exit).start()",
        "import atexit; atexit.register(shared.apply_gradients, [(g, p)])",
    ],
)
def test_each_way_to_end(end: str) -> None:
    assert_ends_well(LARGE.format(call="shared.apply_gradients([(g, p)])"), end=end)


# Python code of the caller that runs while the core holds references.
OWN_CODE = """
import functools
import numpy as np
from fusedadam import _core

class Slow:
    def __init__(self, arrays=()):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        for _ in range(20_000):
            pass
        return self.arrays[index]

    def __repr__(self):
        for _ in range(20_000):
            pass
        return "slow"

class Storage:
    def __init__(self, array):
        self.data_ptr = array.ctypes.data.__int__
        self.nbytes = (2 * array.nbytes).__int__  # with what lies between its elements

class Tensor:
    dtype, layout, device = "torch.float32", "torch.strided", "cpu"
    is_conj = is_neg = bool  # false

    # No Python code of their own: torch's has none either.
    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.stride = functools.partial(list, [step // 4 for step in array.strides])
        self.data_ptr = array.ctypes.data.__int__
        self.untyped_storage = functools.partial(Storage, array)

def copy_like(grad, param):
    for _ in range(20_000):
        pass
    return Tensor(grad.array.copy())

plan, casting = _core.TensorPlan(copy_like), _core.TensorPlan(None, casts=True)
options, progress = _core.AdamOptions({{"clipnorm": 1.0}}), _core.AdamProgress()

def refused(call, *args):
    try:
        call(*args)
    except (TypeError, ValueError):
        return
    raise AssertionError("accepted")

def prepared():
    p, g, m, v = np.full((4, 9), 0.5, "float32")
    params, ms, vs = (list(map(Tensor, np.ones((4, 9), "float32"))) for _ in range(3))
    grads = list(map(Tensor, np.ones((4, 18), "float32")[:, ::2]))
    return lambda: {call}
"""


@pytest.mark.parametrize(
    "call",
    [
        "_core.clip_gradients([p], Slow([g]), options, progress)",
        "refused(casting.step, [Slow()], [g], dict(m=[m], v=[v]), [0], [options], progress)",
        "plan.step(params, grads, dict(m=ms, v=vs), [0] * 4, [options], progress)",
    ],
)
def test_within_code_of_the_callers(call: str) -> None:
    assert_ends_well(OWN_CODE.format(call=call))
