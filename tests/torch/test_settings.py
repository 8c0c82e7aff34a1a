# SPDX-License-Identifier: MIT
"""Settings of groups: which are refused, and that a step reads them as they are at that moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import BAD_SETTINGS, KINDS, SHAPES, Training, leaves, train

EXTRAS: dict[str, Any] = {"max_grad_norm": 2.0, "ema_decay": 0.9, "zero_grad_in_step": True}


@pytest.mark.parametrize(("bad", "error"), BAD_SETTINGS, ids=str)
def test_setting_is_refused(bad: dict[str, Any], error: Any) -> None:
    name = next(iter(bad))
    rule = rf"(?s)({name}|low bits|16 bits)\b.*Received: .+"
    for kind in KINDS:
        with pytest.raises(error, match=rule):
            kind([{"params": leaves(), **bad}])
        if name in (*EXTRAS, "differentiable", "moments", "low_bits", "rounding", "seed"):
            with pytest.raises(error, match=rule):
                kind(leaves(), **bad)
    amsgrad = bad.get("amsgrad", False)  # whose state cannot begin later
    training = Training(AdamW, SHAPES, groups=[{}, {}], ema_decay=0.5, amsgrad=amsgrad)
    training.run(1)
    with training.refused(rule, error):
        training.optimizer.add_param_group({"params": leaves(seed=1), **bad})
    # A scheduler may leave such a value: torch does not check again.
    with training.refused(rule, error, spoilt=True):
        training.give(training.grads())
        training.optimizer.param_groups[1].update(bad)
        training.optimizer.step()
    training.step()


# Formats that the dtype of the parameter excludes, which the first step finds.
UNFIT: list[tuple[str, dict[str, Any]]] = [
    *(
        (dtype, {"moments": moments})
        for dtype in ("float64", "complex64")
        for moments in ("packed", "bfloat16")
    ),
    *(("float16", {"low_bits": low_bits}) for low_bits in ("int8", "int16")),
]


@pytest.mark.parametrize(("dtype", "formats"), UNFIT, ids=str)
def test_formats_that_do_not_fit_are_refused(dtype: str, formats: dict[str, Any]) -> None:
    (name,) = formats
    training = Training(AdamW, [(9, 3)], dtype, **formats)
    training.give(training.grads())
    with training.refused(rf"(low.bits|{name}|16 bits).*Received: .+"):
        training.optimizer.step()
    assert not training.optimizer.state
    training = Training(AdamW, [(9, 3)], dtype)
    training.run(2)
    with training.refused(rf"(low.bits|{name}|16 bits).*Received: .+", spoilt=True):
        training.optimizer.param_groups[0].update(formats)
        training.give(training.grads())
        training.optimizer.step()
    training.optimizer.param_groups[0].update(formats)
    training.optimizer.state_dict()  # which leaves to a step what is wrong
    training.check()


def test_error_has_the_value_and_the_group() -> None:
    params = leaves([(3,), (4,)])
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    message = r"^betas\[1\] must be >= 0 and < 1\. Received: betas\[1\]=1\.0 in param_groups\[1\]$"
    with pytest.raises(ValueError, match=message):
        train(optimizer, 1)
    assert not optimizer.state
    optimizer.param_groups[1].update(betas=(0.9, 0.99), ema_decay=2)
    with pytest.raises(ValueError, match=r"^ema_decay must be finite, >= 0 and <= 1\. Received: "):
        train(optimizer, 1)


def test_error_of_a_number_of_the_users_own_is_passed_on() -> None:
    class Number:
        is_new = True

        def __float__(self) -> float:
            if self.is_new:
                self.is_new = False
                raise ValueError("not now")
            return 0.5

    training = Training(Adam, [(3,)])
    training.step()
    with training.refused(r"^not now$", ValueError):
        training.optimizer.param_groups[0]["lr"] = Number()
        training.optimizer.step()


def test_misspelt_extra_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Did you mean 'ema_decay'\? Received: ema_deacy=0.9"):
        Adam([{"params": leaves(), "ema_deacy": 0.9}])
    # Entries that torch and others keep in groups are left alone.
    Adam([{"params": leaves(), "initial_lr": 1.0, "name": "body", "lr_scale": 0.5}])


@pytest.mark.parametrize(
    "twice",
    [lambda p: [p, p], lambda p: iter([("a", p), ("b", p)])],
    ids=["plain", "of an iterator, with names"],
)
def test_parameter_twice_in_a_group_is_refused(twice: Any) -> None:
    (p,) = leaves([(3,)])
    with pytest.raises(ValueError, match=r"once.*Received: params\[0\] again as params\[1\]"):
        Adam(twice(p))
    training = Training(Adam, [(2,)])
    with training.refused("once"):
        training.optimizer.add_param_group({"params": twice(p)})
    with training.refused("dict", TypeError):
        training.optimizer.add_param_group(leaves())
    training.step()


def test_extras_of_groups() -> None:
    groups = [{"params": leaves([(3,)]), "ema_decay": None}, {"params": leaves([(4,)])}]
    ours = Adam(groups, **EXTRAS)
    ours.add_param_group({"params": leaves([(5,)]), "ema_decay": 0.5})
    assert [g.get("ema_decay") for g in ours.param_groups] == [None, 0.9, 0.5]
    assert "ema_decay" not in ours.param_groups[0]
    assert ours.param_groups[2] | EXTRAS | {"ema_decay": 0.5} == ours.param_groups[2]
    train(ours, 1)
    assert ["ema" in state for state in ours.state.values()] == [False, True, True]
    # As a user or a checkpoint of an earlier version may leave the entries.
    off = {"max_grad_norm": None, "ema_decay": None, "zero_grad_in_step": False}
    ours.param_groups[1].update(off)
    saved = ours.state_dict()
    assert not set(EXTRAS) & set(saved["param_groups"][1])
    saved["param_groups"][0].update(off)
    ours.load_state_dict(saved)
    assert not set(EXTRAS) & set(ours.param_groups[0])
    assert set(EXTRAS) <= set(ours.defaults)
    plain = Adam(leaves())
    plain.param_groups[0].update(off)
    assert not set(EXTRAS) & set(plain.state_dict()["param_groups"][0])
    plain.__setstate__({"defaults": plain.defaults | off, "param_groups": plain.param_groups})
    assert not set(EXTRAS) & set(plain.defaults)


CHANGES: list[dict[str, Any]] = [
    # torch checks lr only in the constructor, and some schedulers end slightly below zero.
    *({"lr": lr} for lr in (0.1, -0.05, 0, np.float32(0.01), torch.tensor([0.05]))),
    *({"betas": betas} for betas in ((0.5, 0.9), (0.0, 0.5))),
    {"eps": 1e-2},
    {"weight_decay": 0.1},
    *({"decoupled_weight_decay": flag} for flag in (False, True)),
    {"maximize": True},
    *({"ema_decay": decay} for decay in (0.5, 0.99)),
    {"zero_grad_in_step": True},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": None, "zero_grad_in_step": False, "ema_decay": None},
    {"seed": 5},
    {"rounding": "nearest"},
]


@pytest.mark.parametrize("first", [0, 1])
def test_settings_of_one_group_change_between_steps(first: int) -> None:
    groups: list[dict[str, Any]] = [{"amsgrad": True}, {"eps": 1e-3, "lr": 0.2}]
    training = Training(KINDS[first], [(3, 4), (5,)], "float32 bfloat16", groups=groups)
    training.step()
    for number, change in enumerate(CHANGES, first):
        training.optimizer.param_groups[number % 2].update(change)
        training.step(missing=0.1)


def test_amsgrad_switched_on_later() -> None:
    # torch has no maximum to continue from and raises KeyError in the middle of its step.
    training = Training(Adam)
    training.run(2)
    with training.refused("max_exp_avg_sq", (ValueError, KeyError), spoilt=True):
        training.optimizer.param_groups[0]["amsgrad"] = True
        training.optimizer.step()
    training.step()
