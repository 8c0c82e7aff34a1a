# SPDX-License-Identifier: MIT
"""Steps of `fusedadam.torch` in every floating-point environment that a caller may set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import output_of
from helpers import running
from processor_state import MODES, Processor, needs_fenv, processor_restored

torch: Any = pytest.importorskip("torch")

import fusedadam.torch
from fusedadam.torch import Adam, AdamW
from torch_helpers import assert_everything_same_bits, everything, grads_like, leaves, set_grads

pytestmark = needs_fenv

SHAPES: list[tuple[int, ...]] = [(40_003,), (), (12, 5)]
SIZES: list[tuple[int, ...]] = [(31,), (), (12, 5)]
OPTIONS: list[dict[str, Any]] = [
    {"eps": 0.0},
    {"lr": 0.3, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"max_grad_norm": 0.7, "ema_decay": 0.9, "zero_grad_in_step": True},
]


def trained(
    processor: Processor, *modes: str, shapes: list[tuple[int, ...]] = SHAPES, **options: Any
) -> Any:
    """An optimizer after steps in this environment. Checks that each step leaves it unchanged."""
    params = leaves(shapes)
    optimizer = AdamW(params, **options)
    rng = np.random.default_rng(4)
    for raised in (False, True, False):
        set_grads(params, grads_like(rng, params))
        for p in params:
            p.grad.view(-1)[::3] *= torch.finfo(p.dtype).smallest_normal
        processor.set(*modes, raised=raised)
        before = processor.state()
        optimizer.step()
        after = processor.state()
        processor.restore()
        assert after == before, modes
    return optimizer


def warm_up() -> None:
    """Run torch's first step of the process, whose imports raise exception flags."""
    (p,) = leaves([(1,)])
    p.grad = torch.ones_like(p)
    Adam([p]).step()


@pytest.fixture
def processor() -> Iterator[Processor]:
    warm_up()
    with processor_restored() as processor:
        yield processor


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, SIZES], ids=["threads", "no threads"])
def test_step(processor: Processor, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    with running(threads=3):
        expected = everything(trained(processor, shapes=shapes, **options))
        for modes in MODES:
            actual = everything(trained(processor, *modes, shapes=shapes, **options))
            assert_everything_same_bits(actual, expected, str(modes))


@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**30])
def test_count_in_a_float32(processor: Processor, count: int) -> None:
    # Where it rounds, it rounds to nearest and raises no flag.
    for modes in ((), *MODES):
        (p,) = leaves([(3,)])
        optimizer = Adam([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["step"].fill_(count)
        processor.set(*modes)
        before = processor.state()
        optimizer.step()
        after = processor.state()
        processor.restore()
        assert after == before
        assert optimizer.state[p]["step"].item() == max(count, 2**24)


def test_sparse_step(processor: Processor) -> None:
    def stepped(*modes: str) -> Any:
        (p,) = leaves([(50, 6)])
        optimizer = Adam([p], lr=0.3)
        rng = np.random.default_rng(6)
        indices = torch.from_numpy(rng.integers(0, 50, (1, 30)))
        rows = torch.from_numpy(rng.standard_normal((30, 6)).astype("float32"))
        for _ in range(3):
            p.grad = torch.sparse_coo_tensor(indices, rows, (50, 6), check_invariants=True)
            processor.set(*modes)
            before = processor.state()
            optimizer.step()
            after = processor.state()
            processor.restore()
            assert after == before, modes
        return everything(optimizer)

    expected = stepped()
    for modes in MODES:
        assert_everything_same_bits(stepped(*modes), expected, str(modes))


def test_step_within_the_backward_pass(processor: Processor) -> None:
    # Gradients are exact, so the flags are those of torch's own pass.
    def stepped(*modes: str) -> Any:
        model = torch.nn.Linear(5, 3)
        for i, p in enumerate(model.parameters()):
            p.data = leaves([tuple(p.shape)], seed=i)[0].data
        optimizer = Adam(model.parameters(), lr=0.3)
        with fusedadam.torch.attach(model, optimizer):
            for _ in range(3):
                loss = model(torch.ones(1, 5)).sum()
                processor.set(*modes)
                before = processor.state()
                loss.backward()
                after = processor.state()
                processor.restore()
                assert after._replace(flags=before.flags) == before, modes
        return everything(optimizer)

    expected = stepped()
    for modes in MODES:
        assert_everything_same_bits(stepped(*modes), expected, str(modes))


@pytest.mark.parametrize("flush", [True, False])
def test_torchs_own_switch_neither_changes_a_step_nor_is_changed(flush: bool) -> None:
    code = f"""
        import torch
        import fusedadam.torch
        p = torch.nn.Parameter(torch.ones(40_000))
        optimizer = fusedadam.torch.Adam([p], eps=1e-20)
        p.grad = torch.full_like(p, 1e-38)  # m is 1e-39, no normal number
        subnormal = torch.full((3,), 1e-40)  # no work for torch's other threads
        flushes = torch.set_flush_denormal({flush}) and {flush}
        optimizer.step()
        with torch.no_grad():
            product = (subnormal * 1).view(torch.int32)
        assert (product == 0).all().item() == flushes
        assert (optimizer.state[p]["exp_avg"].view(torch.int32) != 0).all()
        print("left")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "2"}) == "left"


def test_no_step_springs_a_trap_of_the_caller() -> None:
    here = str(Path(__file__).parent)
    code = f"""
        import sys
        sys.path.append({here!r})
        from test_torch_float_environment import *
        warm_up()
        with processor_restored() as processor:
            for options in OPTIONS:
                params = leaves(SHAPES)
                optimizer = AdamW(params, **options)
                for _ in range(2):
                    set_grads(params, [torch.full_like(p, float("inf")) for p in params])
                    processor.set(traps=True)
                    before = processor.state()
                    optimizer.step()
                    after = processor.state()
                    processor.restore()
                    assert after == before
        print("done")
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "done"


def test_import_changes_no_floating_point_setting() -> None:
    code = """
        import torch
        from processor_state import Processor
        processor = Processor()
        processor.set("upward", "flush", raised=True)
        before = processor.state()
        import fusedadam.torch
        after = processor.state()
        processor.restore()
        # Python's own reading of numbers raises flags, and a module has numbers in it.
        print(after._replace(flags=before.flags) == before)
    """
    assert output_of(code) == "True"
