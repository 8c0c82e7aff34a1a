# SPDX-License-Identifier: MIT
"""`fusedadam.torch` with extreme floats, compared bit for bit, and with extreme step counts.

torch counts the steps of a parameter in a tensor of the default dtype. That counter stops at 2**24
in float32 and at 2**53 in float64. This package does the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
from extremes import column, product, special
from helpers import FLOATS

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import KINDS, Training, params_of

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "ema_decay": 0.9, "weight_decay": 0.1, "maximize": True},
    {"eps": 0.0, "max_grad_norm": 1.0},
    # On both sides of the limit from which subnormal moments are kept.
    *({"eps": eps} for eps in (1e-12, 9.9e-13)),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_numbers(dtype: str, options: dict[str, Any]) -> None:
    numbers = special(dtype)
    p, g, m, v = product([numbers] * 4)
    extra = column(numbers, [1, 1, 1, 1], 0, 4)
    start = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": extra, "ema": extra}
    training = Training(AdamW, [p.shape], dtype, **options)
    training.step()
    training.params[0].data.copy_(torch.from_numpy(p))
    for name in training.state[0].keys() & start.keys():
        training.state[0][name].copy_(torch.from_numpy(start[name]))
    training.adopt()
    training.step([torch.from_numpy(g)])


# -- counts -----------------------------------------------------------------------------------


@pytest.fixture(params=FLOATS)
def counter_dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """The dtype in which torch counts: the default dtype."""
    name: str = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield name
    finally:
        torch.set_default_dtype(before)


def counted(count: float, kind: Any = Adam) -> Training:
    """A training of one parameter that has taken `count` steps."""
    beta_1, beta_2 = 1 - 2.0**-40, 1 - 3 * 2.0**-25
    options: dict[str, Any] = {"lr": 0.3, "betas": (beta_1, beta_2), "eps": 1e-3}
    training = Training(kind, [(3,)], "float64", beside_torch=True, **options)
    training.step()
    for optimizer in (training.optimizer, training.stock):
        for state in optimizer.state.values():
            state["step"].fill_(count)
    return training


COUNTS = [1, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 2, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_count_goes_on_as_torchs_own(kind: Any, counter_dtype: str, count: int) -> None:
    training = counted(count, kind)
    for _ in range(3):
        training.adopt()
        grads = training.grads()
        for p in (*training.params, *params_of(training.stock)):
            p.grad = grads[0].clone()
        # A count that no longer increases is still the number of steps before this one.
        training.expect(grads)
        training.optimizer.step()
        training.stock.step()
        (mine,), (other,) = training.state, training.stock.state.values()
        assert mine["step"].dtype == other["step"].dtype == getattr(torch, counter_dtype)
        assert mine["step"].item() == other["step"].item()
        training.steps = [int(mine["step"])]
        training.check()
    other = counted(1, kind)
    other.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    step = other.state[0]["step"]
    assert (step.item(), step.dtype) == (mine["step"].item(), mine["step"].dtype)


@pytest.mark.parametrize("count", [-1.0, 0.5, 2.0**53 + 2, 2.0**60, math.inf, -math.inf, math.nan])
def test_count_out_of_range_is_refused(counter_dtype: str, count: float) -> None:
    if counter_dtype == "float32" and count == 2.0**53 + 2:
        count = 2.0**53 + 2.0**30  # the next float32
    training = counted(1)
    training.adopt()
    message = r"^step\[0\] must be a whole number >= 0 and <= 2\*\*53\. Received: "
    with training.refused(message, ValueError, spoilt=True):
        training.state[0]["step"] = torch.tensor(count)
        training.optimizer.step()
    training.step()
