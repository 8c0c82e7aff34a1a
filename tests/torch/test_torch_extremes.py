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
import oracle
import pytest
from extremes import column, product, special
from helpers import FLOATS, Array, assert_all_same_bits, running

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import KINDS, STOCK, assert_everything_same_bits, everything

# -- numbers ----------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.0},
    {"eps": 1e-46},
    {"eps": 1e300},
    {"lr": 0.0},
    {"lr": 1e300},
    {"betas": (0.0, 0.0)},
    {"betas": (1 - 2**-53, 1 - 2**-53)},
    {"weight_decay": 0.1},
    {"weight_decay": 1e300},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"ema_decay": 0.9},
    {"ema_decay": 1.0},
    {"max_grad_norm": 1.0},
    {"zero_grad_in_step": True},
]
STEP = 4


def expected_of(kind: Any, arrays: dict[str, Array], g: Array, **options: Any) -> list[Array]:
    """The oracle's parameter, moments and further state."""
    eps, decay = options.get("eps", 1e-8), options.get("weight_decay", 0.0)
    beta_1, beta_2 = options.get("betas", (0.9, 0.999))
    sign = -1.0 if options.get("maximize") else 1.0
    (clipped,) = oracle.clip([g], clipnorm=options.get("max_grad_norm"), sign=sign)
    return list(
        oracle.adam_step(
            arrays["param"],
            clipped,
            arrays["exp_avg"],
            arrays["exp_avg_sq"],
            vhat=arrays.get("max_exp_avg_sq"),
            ema=arrays.get("ema"),
            step=STEP,
            lr=options.get("lr", 1e-3),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=eps,
            bias_corrected_epsilon=True,
            ema_momentum=options.get("ema_decay", 0.0),
            flush_denormals=eps >= 1e-12,
            **{"weight_decay" if kind is AdamW else "l2": decay},
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_numbers(kind: Any, dtype: str, options: dict[str, Any]) -> None:
    options = {"weight_decay": 0.0} | options
    numbers = special(dtype)
    p, g, m, v = product([numbers] * 4)
    arrays = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    if options.get("amsgrad"):
        arrays["max_exp_avg_sq"] = column(numbers, [1, 1, 1, 1], 0, 4)
    if "ema_decay" in options:
        arrays["ema"] = column(numbers, [1, 1, 1, 1], 0, 4)

    expected = expected_of(kind, arrays, g, **options)

    param = torch.nn.Parameter(torch.zeros(p.size, dtype=getattr(torch, dtype)))
    optimizer = kind([param], **options)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    tensors = {name: param.detach() if name == "param" else state[name] for name in arrays}
    for isa in fusedadam.supported_isas():
        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(array))
        state["step"].fill_(STEP - 1)
        param.grad = torch.from_numpy(g.copy())
        with running(isa=isa):
            optimizer.step()
        actual = [tensor.numpy() for tensor in tensors.values()]
        assert_all_same_bits(actual, expected, f"{isa}: {list(arrays)}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_parameters_that_are_not_finite_are_so_in_torch_too(kind: Any, dtype: str) -> None:
    # Moments are not compared: torch computes m + (1 - beta_1) * (g - m), which turns an infinite m
    # into NaN.
    numbers = special(dtype)
    params = [torch.nn.Parameter(torch.ones(numbers.size, dtype=getattr(torch, dtype)))]
    twins = copy.deepcopy(params)
    ours, theirs = kind(params), STOCK[kind](twins, foreach=False)
    for grad in (torch.from_numpy(numbers), *(torch.full_like(params[0], 0.5) for _ in range(5))):
        for p in (*params, *twins):
            p.grad = grad.clone()
        ours.step()
        theirs.step()
        a, e = (tensors[0].detach().numpy() for tensors in (params, twins))
        for quality in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(quality(a), quality(e))


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


def counted(kind: Any, count: float, **options: Any) -> tuple[Any, Any]:
    """An optimizer of one parameter that has taken `count` steps, and its parameter."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    p.grad = torch.tensor([0.5, 1.0, -0.25], dtype=torch.float64)
    optimizer = kind([p], **options)
    optimizer.step()
    optimizer.state[p]["step"].fill_(count)
    return optimizer, p


COUNTS = [1, 2**24 - 2, 2**24 - 1, 2**24, 2**24 + 2, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_count_goes_on_as_torchs_own(kind: Any, counter_dtype: str, count: int) -> None:
    ours, p = counted(kind, count)
    theirs, q = counted(STOCK[kind], count, foreach=False)
    for _ in range(3):
        ours.step()
        theirs.step()
        mine, other = ours.state[p]["step"], theirs.state[q]["step"]
        assert mine.dtype == other.dtype == getattr(torch, counter_dtype)
        assert mine.item() == other.item()
    last = 2**24 if counter_dtype == "float32" else 2**53
    if count == last:
        assert mine.item() == last


@pytest.mark.parametrize("count", COUNTS)
def test_step_at_a_count_is_the_oracles(counter_dtype: str, count: int) -> None:
    # A count that no longer increases is still the number of steps before this one.
    beta_2, decay = 1 - 3 * 2.0**-25, 1 - 2.0**-40
    options = {"lr": 0.3, "betas": (decay, beta_2), "eps": 1e-3}
    optimizer, p = counted(Adam, count, **options)
    before = everything(optimizer)[0]
    exact = int(np.dtype(counter_dtype).type(count))
    expected = oracle.adam_step(
        before["param"],
        p.grad.numpy(),
        before["exp_avg"],
        before["exp_avg_sq"],
        step=exact + 1,
        lr=0.3,
        beta_1=decay,
        beta_2=beta_2,
        epsilon=1e-3,
        bias_corrected_epsilon=True,
    )
    optimizer.step()
    after = everything(optimizer)[0]
    assert_all_same_bits([after[n] for n in ("param", "exp_avg", "exp_avg_sq")], expected)


@pytest.mark.parametrize("count", [-1.0, 0.5, 2.0**53 + 2, 2.0**60, math.inf, -math.inf, math.nan])
def test_count_out_of_range_is_refused(counter_dtype: str, count: float) -> None:
    if counter_dtype == "float32" and count == 2.0**53 + 2:
        count = 2.0**53 + 2.0**30  # the next float32
    optimizer, _ = counted(Adam, count)
    before = everything(optimizer)
    message = r"^step\[0\] must be a whole number >= 0 and <= 2\*\*53\. Received: "
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_everything_same_bits(everything(optimizer), before)


@pytest.mark.parametrize("count", [2**24, 2**53])
def test_count_survives_a_checkpoint(counter_dtype: str, count: int) -> None:
    optimizer, p = counted(AdamW, count)
    other, q = counted(AdamW, 1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = other.state[q]["step"]
    assert step.item() == count
    assert step.dtype == optimizer.state[p]["step"].dtype == getattr(torch, counter_dtype)
