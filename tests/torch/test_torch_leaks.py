# SPDX-License-Identifier: MIT
"""`fusedadam.torch` keeps nothing from a call, and its optimizers are freed."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from leaks import CALLS, assert_flat, expect, resident_bytes

torch: Any = pytest.importorskip("torch")

import fusedadam.torch

Call = Callable[[], object]

# torch's own part of these calls takes about ten times as long as ours.
_CALLS = max(600, CALLS // 2)


def trained(**options: Any) -> tuple[Any, Any]:
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    optimizer = fusedadam.torch.AdamW([param], **options)
    optimizer.step()
    return optimizer, param


def _kinds() -> dict[str, Call]:
    optimizer, param = trained()
    everything, _ = trained(amsgrad=True, ema_decay=0.9, max_grad_norm=1.0, zero_grad_in_step=True)
    other, other_param = trained()
    sparse, sparse_param = trained()
    sparse_param.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 0, 1]]), torch.ones(3, 2), (3, 2), check_invariants=True
    )
    strided, strided_param = trained()
    strided_param.grad = torch.ones(2, 3).T
    refused, refused_param = trained()
    refused.state[refused_param]["exp_avg"] = torch.ones(5)
    model = torch.nn.Linear(3, 1)
    attached_to = fusedadam.torch.Adam(model.parameters())
    x = torch.ones(2, 3)

    def attach() -> None:
        with fusedadam.torch.attach(model, attached_to):
            model(x).sum().backward()

    def fails() -> None:
        refused.step()

    def loads() -> None:
        other.load_state_dict(other.state_dict())
        other.step()

    def swaps() -> None:
        everything.swap_ema()
        everything.swap_ema()

    def other_group() -> None:
        other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "eps": -1.0})

    return {
        "step": optimizer.step,
        "all options": everything.step,
        "swap_ema": swaps,
        "sparse": sparse.step,
        "copied gradient": strided.step,
        "new": lambda: trained(),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "load_state_dict": loads,
        "attach": attach,
        "refused step": expect(ValueError, fails),
        "refused group": expect(ValueError, other_group),
        "closure": lambda: optimizer.step(lambda: param.sum()),
        "parameter": lambda: other_param.sum(),
    }


KINDS = list(_kinds())


@pytest.mark.parametrize("name", KINDS)
def test_nothing_stays(name: str) -> None:
    assert_flat(_kinds()[name], calls=_CALLS)


def _after_an_error() -> Any:
    optimizer, param = trained()
    optimizer.state[param]["exp_avg"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"exp_avg\[0\] must be"):
        optimizer.step()
    return optimizer


def _attached() -> Any:
    model = torch.nn.Linear(3, 1)
    optimizer = fusedadam.torch.Adam(model.parameters())
    with fusedadam.torch.attach(model, optimizer):
        model(torch.ones(2, 3)).sum().backward()
    return optimizer


@pytest.mark.parametrize("make", [lambda: trained()[0], _after_an_error, _attached], ids=str)
def test_an_optimizer_is_freed(make: Callable[[], Any]) -> None:
    # Freed by the cycle collector only, like torch's own: it holds a wrapper of its own `step`.
    optimizer = make()
    died = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert died() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_moments_is_given_back() -> None:
    param = torch.nn.Parameter(torch.ones(4 << 20))
    param.grad = torch.ones_like(param)
    optimizer = fusedadam.torch.Adam([param])
    optimizer.step()
    held = resident_bytes()
    del optimizer
    gc.collect()
    assert held - resident_bytes() > 0.9 * 2 * param.nbytes
