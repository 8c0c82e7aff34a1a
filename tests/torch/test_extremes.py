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

import fusedadam
import numpy as np
import pytest
from extremes import column, product, special
from helpers import FLOATS, running

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam
from torch_helpers import KINDS, NAMES, Training, array, everything, params_of

OPTIONS: list[dict[str, Any]] = [
    {},
    *({"eps": eps} for eps in (0.0, 1e-46, 1e-12, 9.9e-13, 1e300)),
    *({"lr": lr} for lr in (0.0, 1e300)),
    *({"betas": (beta, beta)} for beta in (0.0, 1 - 2**-53)),
    {"weight_decay": 0.1},
    {"weight_decay": 1e300},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"ema_decay": 0.9},
    {"ema_decay": 1.0},
    {"max_grad_norm": 1.0},
    {"zero_grad_in_step": True},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_numbers(kind: Any, dtype: str, options: dict[str, Any]) -> None:
    numbers = special(dtype)
    p, g, m, v = product([numbers] * 4)
    extra = column(numbers, [1, 1, 1, 1], 0, 4)
    kinds = {"params": p, "m": m, "v": v, "vhat": extra, "ema": extra}
    training = Training(kind, [p.shape], dtype, **{"weight_decay": 0.0} | options)
    training.step()
    start = {name: kinds[name] for name in training.stored[0]}
    (param,), (state,) = training.params, training.state
    names = {kind: name for name, kind in NAMES.items()}
    for isa in fusedadam.supported_isas():
        for name, x in start.items():
            t = param.detach() if name == "params" else state[names[name]]
            t.copy_(torch.from_numpy(x))
        state["step"].fill_(3)
        training.adopt()
        with running(isa=isa):
            training.step([torch.from_numpy(g)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_that_are_not_finite_are_so_in_torch_too(kind: Any, dtype: str) -> None:
    # Moments are not compared: torch computes m + (1 - beta_1) * (g - m), which turns an infinite m
    # into NaN.
    numbers = torch.from_numpy(special(dtype))
    training = Training(kind, [numbers.shape], dtype, beside_torch=True)
    for grad in (numbers, *(torch.full_like(numbers, 0.5) for _ in range(4))):
        training.step([grad])
        a, e = (everything(o)[0]["param"] for o in (training.optimizer, training.stock))
        for quality in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(quality(a), quality(e))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_subnormals_beside_torch(eps: float) -> None:
    # Squares are subnormal float32 with at least 7 bits; then moments decay beyond the subnormals.
    training = Training(Adam, [(50,)], beside_torch=True, eps=eps)
    for _ in range(10):
        training.step([(1 + torch.rand(50)) * 1e-19])
    for _ in range(0 if eps == 0 else 900):
        training.step([torch.zeros(50)])
    ours, theirs = (everything(o)[0]["param"] for o in (training.optimizer, training.stock))
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-6)
    assert eps == 0 or np.abs(array(training.state[0]["exp_avg"])).max() < 1e-38


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
