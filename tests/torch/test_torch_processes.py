# SPDX-License-Identifier: MIT
"""Processes with torch: `DataLoader` workers, and forks of a process with running torch threads.

Each test is a separate process, which is killed if it hangs.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import helpers
import pytest
from fresh_python import output_of
from step_scripts import FORK

pytest.importorskip("torch")

THREADS = {"OMP_NUM_THREADS": "3"}
# torch warns that there are more workers than CPUs, and Python 3.12 and later warn that a process
# with threads forks. Both are intended here.
START = f"""
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")
    sys.path.insert(0, {str(Path(helpers.__file__).parent)!r})
    import torch, fusedadam
    from helpers import assert_all_same_bits
    from torch_workers import SAMPLES, SIZE, SteppedSamples, Training, sample
    LIMIT_S = 60
    fusedadam.set_num_threads(3)
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


WORKERS = [(method, True) for method in multiprocessing.get_all_start_methods()]
if hasattr(os, "fork"):
    WORKERS.append(("fork", False))  # forks again for the second epoch


@pytest.mark.parametrize(("method", "persistent"), WORKERS)
def test_workers_that_step_beside_a_training(method: str, persistent: bool) -> None:
    code = f"""{START}
    expected = Training()
    for _ in range(2):
        # In this process: threads of both libraries exist when workers are started.
        expected.epoch(torch.utils.data.DataLoader(SteppedSamples(), batch_size=2))

    loader = torch.utils.data.DataLoader(
        SteppedSamples(),
        batch_size=2,
        num_workers=2,
        multiprocessing_context={method!r},
        persistent_workers={persistent},
        timeout=LIMIT_S,
    )
    training = Training()
    for _ in range(2):
        training.epoch(loader)
    assert_all_same_bits(training.results(), expected.results())
    batches = torch.cat(list(loader))
    assert_all_same_bits(batches.numpy(), [sample(i).numpy() for i in range(SAMPLES)])
    print("same")
    """
    assert output_of(code, environment=THREADS) == "same"


@needs_fork
def test_workers_are_forked_while_another_thread_steps() -> None:
    code = f"""{START}
    # The first optimizer imports much of torch, and a fork during an import of another thread leaves
    # the child a module that is never complete.
    expected = [sample(i).numpy() for i in range(SAMPLES)]
    stop = threading.Event()

    def keep_stepping():
        training = Training()
        training.param.grad = torch.ones(SIZE)
        while not stop.is_set():
            training.optimizer.step()

    threads = [threading.Thread(target=keep_stepping) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        loader = torch.utils.data.DataLoader(
            SteppedSamples(),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            timeout=LIMIT_S,
        )
        assert_all_same_bits([x.numpy() for x in loader], expected)
    stop.set()
    print("same")
    """
    assert output_of(code, environment=THREADS) == "same"


@needs_fork
def test_forks_and_their_forks_after_torch_has_started_threads() -> None:
    code = f"""{START}{FORK}
    matrix = torch.ones(400, 400)
    assert (matrix @ matrix).sum().item() == 400.0**3
    assert torch.ones(1_000_000).add(1).sum().item() == 2_000_000
    training, twin = Training(), Training()
    for each in (training, twin):
        each.param.grad = torch.linspace(-1, 1, SIZE)
        each.optimizer.step()
    twin.optimizer.step()

    def work(generations):
        assert fusedadam.get_num_threads() == 1
        training.optimizer.step()
        assert_all_same_bits(training.results(), twin.results())
        sample(0)
        if generations > 1:
            twin.optimizer.step()
            assert in_child(lambda: work(generations - 1)) == 0

    print(in_child(lambda: work(3)))
    assert fusedadam.get_num_threads() == 3
    training.optimizer.step()
    assert_all_same_bits(training.results(), twin.results())
    """
    assert output_of(code, environment=THREADS) == "0"
