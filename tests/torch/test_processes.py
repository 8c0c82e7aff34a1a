# SPDX-License-Identifier: MIT
"""`fusedadam.torch` in its process: floating-point modes, leaks, memory, interrupts, threads, forks.

What is tested here goes through torch's own code; `tests/process` has the same for NumPy.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from at_once import Ticks, together
from ends import assert_ends_well
from fresh_python import output_of
from helpers import running
from interrupts import Case, interrupt_everywhere
from leaks import CALLS, assert_flat, expect
from processor_state import MODES, Processor, needs_fenv, processor_restored

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW, attach
from torch_helpers import LARGE, SHAPES, Shapes, Training, drawn_rows, everything, leaves, sparse

linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux: /proc, limits")

# -- the floating-point environment -----------------------------------------------------------


@pytest.fixture
def processor() -> Iterator[Processor]:
    Training().step()  # torch's first step, whose imports raise exception flags
    with processor_restored() as processor:
        yield processor


EXTRAS: dict[str, Any] = {"max_grad_norm": 0.7, "ema_decay": 0.9, "zero_grad_in_step": True}


@needs_fenv
@pytest.mark.parametrize("options", [EXTRAS, {"moments": "packed"}], ids=str)
@pytest.mark.parametrize("modes", [(), *MODES], ids=str)
def test_step_in_every_mode(
    processor: Processor, modes: tuple[str, ...], options: dict[str, Any]
) -> None:
    training = Training(AdamW, [(50, 6), (40_003,), (31,), ()], **options)
    with running(threads=3):
        for raised in (False, True):
            rows = drawn_rows(training.rng, training.rng.integers(0, 50, 30), training.params[0])
            dense = training.grads()[1:]
            for g in dense:
                g.view(-1)[::3] *= torch.finfo(g.dtype).smallest_normal
            training.give([rows, *dense])
            training.expect([rows, *dense])
            processor.set(*modes, raised=raised)
            before = processor.state()
            training.optimizer.step()
            after = processor.state()
            processor.restore()
            assert after == before
            training.check()


@needs_fenv
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**30])
def test_count_in_a_float32_in_every_mode(processor: Processor, count: int) -> None:
    # Where it rounds, it rounds to nearest and raises no flag.
    for modes in ((), *MODES):
        training = Training(Adam, [(3,)])
        training.step()
        training.state[0]["step"].fill_(count)
        processor.set(*modes)
        before = processor.state()
        training.optimizer.step()
        after = processor.state()
        processor.restore()
        assert after == before
        assert training.state[0]["step"].item() == max(count, 2**24)


# -- leaks ------------------------------------------------------------------------------------

Call = Callable[[], object]


def trained(grad: Any = None, **options: Any) -> tuple[Any, Any]:
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2) if grad is None else grad
    optimizer = AdamW([param], **options)
    optimizer.step()
    return optimizer, param


def refused() -> Any:
    optimizer, param = trained()
    optimizer.state[param]["exp_avg"] = torch.ones(5)
    return optimizer


def attached_step(model: Any, optimizer: Any) -> Any:
    with attach(model, optimizer):
        model(torch.ones(2, 3)).sum().backward()
    return optimizer


def kinds_of_calls() -> dict[str, Call]:
    optimizer, param = trained()
    everything, _ = trained(amsgrad=True, ema_decay=0.9, max_grad_norm=1.0, zero_grad_in_step=True)
    other, _ = trained()
    model = torch.nn.Linear(3, 1)
    attached_to = Adam(model.parameters())

    def loads() -> None:
        other.load_state_dict(other.state_dict())
        other.step()

    def other_group() -> None:
        other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "eps": -1.0})

    return {
        "step": optimizer.step,
        "all options": everything.step,
        "swap_ema": lambda: (everything.swap_ema(), everything.swap_ema()),
        "sparse": trained(sparse([1, 0, 1], torch.ones(3, 2), (3, 2)))[0].step,
        "copied gradient": trained(torch.ones(2, 3).T)[0].step,
        "new and refused": expect(ValueError, lambda: refused().step()),
        "new and attached": lambda: attached_step(model, Adam(model.parameters())),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "load_state_dict": loads,
        "attach": lambda: attached_step(model, attached_to),
        "refused step": expect(ValueError, refused().step),
        "refused group": expect(ValueError, other_group),
        "closure": lambda: optimizer.step(lambda: param.sum()),
    }


@pytest.mark.parametrize("name", list(kinds_of_calls()))
def test_nothing_stays(name: str) -> None:
    # torch's own part of these calls takes about ten times as long as ours.
    assert_flat(kinds_of_calls()[name], calls=max(400, CALLS // 2))


# -- interrupts and out of memory -------------------------------------------------------------


class Steps(Case):
    """A step after earlier ones."""

    def __init__(self, steps: int, shapes: Any = ((3, 2), (5,)), **options: Any) -> None:
        self.params = leaves(shapes)
        self.optimizer: Any = Adam(self.params, lr=0.1, **options)
        for _ in range(steps):
            self.set_grads()
            self.optimizer.step()
        self.set_grads()

    def set_grads(self) -> None:
        for p in self.params:
            p.grad = p.detach() + 1

    def call(self) -> object:
        return self.optimizer.step()

    def go_on(self) -> object:
        self.set_grads()
        return self.optimizer.step()

    def observe(self) -> object:
        kept = everything(self.optimizer)
        return [{name: a.tobytes() for name, a in state.items()} for state in kept]


class NewAverages(Steps):
    """A step that adds averages to existing moments."""

    def __init__(self, **of: Any) -> None:
        super().__init__(1, **of)
        self.optimizer.param_groups[0]["ema_decay"] = 0.9


class Strided(Steps):
    """A step with a gradient of another layout, which is copied."""

    def set_grads(self) -> None:
        for p in self.params:
            p.grad = (p.detach() + 1).T.contiguous().T


class Swap(Steps):
    """Averages swapped with the parameters."""

    def __init__(self, **of: Any) -> None:
        super().__init__(2, ema_decay=0.9, **of)

    def call(self) -> object:
        return self.optimizer.swap_ema()

    def go_on(self) -> object:
        with contextlib.suppress(ValueError):
            return super().go_on()
        # The averages are swapped in.
        self.optimizer.swap_ema()
        return super().go_on()


class Attached(Case):
    """A backward pass that steps each parameter."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(3, 1, bias=False)
        self.optimizer = AdamW(self.model.parameters(), lr=0.1)
        attach(self.model, self.optimizer)

    def call(self) -> object:
        return self.model(torch.ones(2, 3)).sum().backward()

    def go_on(self) -> object:
        # A gradient remains if its step has not begun. If one remained after its step, it would be
        # used again.
        (weight,) = self.model.parameters()
        assert weight.grad is None or self.optimizer.state[weight]["step"] == 0
        weight.grad = None
        return self.call()

    def observe(self) -> object:
        return [{k: a.tobytes() for k, a in s.items()} for s in everything(self.optimizer)]


CASES: dict[str, Callable[[], Case]] = {
    "first step": lambda: Steps(0),
    "step": lambda: Steps(2),
    "first step with options": lambda: Steps(0, amsgrad=True, ema_decay=0.9, max_grad_norm=1.0),
    "averages begin": NewAverages,
    "swap_ema": Swap,
    "backward": Attached,
}


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_call_is_whole(name: str) -> None:
    # An interrupt in torch's own Python code may leave its grad mode wrong.
    within_torch = str(Path(torch.__file__).parent)
    assert interrupt_everywhere(CASES[name], times=1, not_within=(within_torch,)) > 5


class Interrupted:
    """A plan whose interrupt arrives after its step."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def step_counted(self, *arguments: Any) -> int:
        self.plan.step_counted(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("steps", "dtype", "later"),
    [
        (0, "float32", {}),
        (1, "float32", {"ema_decay": 0.5}),
        (1, "bfloat16", {"moments": "packed"}),
        (1, "bfloat16", {"low_bits": "int8"}),
    ],
)
def test_state_of_a_step_that_was_taken_is_kept(
    steps: int, dtype: str, later: dict[str, Any]
) -> None:
    training = Training(Adam, [(70,)], dtype)
    training.run(steps)
    training.optimizer.param_groups[0].update(later)
    training.give(grads := training.grads())
    training.expect(grads)
    training.optimizer._plan.core = Interrupted(training.optimizer._plan.core)
    with pytest.raises(KeyboardInterrupt):
        training.optimizer.step()
    training.check()


@linux
def test_out_of_memory() -> None:
    # torch's allocator, which copies gradients and creates late averages, raises RuntimeError. The
    # core's allocations raise MemoryError.
    folder = str(Path(__file__).parent)
    code = f"""
        import json, sys
        sys.path.append({folder!r})
        from memory_limit import MIB, exhaust
        from test_processes import NewAverages, Steps, Strided, Swap

        of = {{"shapes": [(512, MIB // 4 // 512)]}}
        errors = (MemoryError, RuntimeError)
        print(json.dumps({{
            "first step": exhaust(lambda: Steps(0, **of)),
            "first step, more state": exhaust(lambda: Steps(0, amsgrad=True, ema_decay=0.9, **of)),
            "gradient that is copied": exhaust(lambda: Strided(1, **of), errors),
            "averages that begin": exhaust(lambda: NewAverages(**of), errors),
            "swap_ema": exhaust(lambda: Swap(**of), errors),
        }}))
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    failures = json.loads(output_of(code, environment=environment))
    logging.getLogger(__name__).info("failures of each call: %s", failures)
    assert all(failures.values())


# -- Python threads ---------------------------------------------------------------------------


def test_other_threads_run_during_a_long_step(ticks: Ticks) -> None:
    (p,) = leaves([(4_000_000,)])
    optimizer = Adam([p])
    p.grad = torch.ones_like(p)
    with running(threads=1):
        ticks.assert_run_during(optimizer.step)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_one_optimizer_from_several_threads(shapes: Shapes) -> None:
    # Steps of one optimizer are serialized. The gradients are constant, so the order of the threads
    # does not matter.
    training = Training(AdamW, shapes, lr=0.01, max_grad_norm=1.0, ema_decay=0.9)
    training.step(grads := training.grads())
    with running(threads=2):
        together(4, lambda _: [training.optimizer.step() for _ in range(20)])
    for _ in range(80):
        training.expect(grads)
    training.check()


def test_the_interpreter_may_end_within_a_step() -> None:
    # Excludes the first step, which calls torch, and record_function(), in which torch wraps a
    # step. torch's own calls, and the destructors of its tensors, would end the process likewise.
    assert_ends_well("""
import functools
import torch
import fusedadam.torch

def prepared():
    param = torch.nn.Parameter(torch.ones(3_000_000))
    param.grad = torch.ones(3_000_000)
    optimizer = fusedadam.torch.AdamW([param])
    optimizer.step()
    return functools.partial(type(optimizer).step.__wrapped__, optimizer)
""")


# -- `DataLoader` workers ---------------------------------------------------------------------

WORKERS = [(method, True) for method in multiprocessing.get_all_start_methods()]
if hasattr(os, "fork"):
    WORKERS.append(("fork", False))  # forks again for the second epoch


@pytest.mark.parametrize(("method", "persistent"), WORKERS)
def test_workers_that_step_beside_a_training(method: str, persistent: bool) -> None:
    # torch warns that there are more workers than CPUs, and Python 3.12 and later warn that a
    # process with threads forks. Both are intended here.
    code = f"""
        import warnings
        warnings.simplefilter("ignore")
        import torch, fusedadam.torch
        from torch_workers import SIZE, SteppedSamples, steps
        fusedadam.set_num_threads(3)
        # Threads of both libraries exist when workers are started.
        expected = [steps(index) for index in range(6)]
        param = torch.nn.Parameter(torch.zeros(SIZE))
        optimizer = fusedadam.torch.Adam([param])
        loader = torch.utils.data.DataLoader(
            SteppedSamples(),
            batch_size=None,
            num_workers=2,
            multiprocessing_context={method!r},
            persistent_workers={persistent},
            timeout=60,
        )
        for _ in range(2):
            for sample, other in zip(loader, expected, strict=True):
                assert torch.equal(sample, other)
                param.grad = sample
                optimizer.step()
        print(optimizer.state[param]["step"].item())
    """
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "12.0"
