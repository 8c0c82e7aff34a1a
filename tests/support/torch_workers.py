# SPDX-License-Identifier: MIT
"""`DataLoader` workers for the process tests: samples that take steps, and a training on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import fusedadam.torch
import numpy as np
import torch
from fusedadam import Adam

SAMPLES = 6
SIZE = 40_000  # more than the 32,768 elements from which a step uses several threads


def sample(index: int) -> Any:
    """Take steps with both interfaces, in whichever process calls this."""
    p, g = np.random.default_rng(index).standard_normal((2, SIZE)).astype(np.float32)
    optimizer = Adam(clipnorm=1.0)
    for _ in range(2):
        optimizer.apply_gradients([(g, p)])
    param = torch.nn.Parameter(torch.from_numpy(p))
    param.grad = torch.from_numpy(g)
    fusedadam.torch.AdamW([param], lr=0.01, max_grad_norm=1.0).step()
    return param.detach()


class SteppedSamples(torch.utils.data.Dataset[Any]):
    """Samples that a worker creates by taking steps."""

    def __getitem__(self, index: int) -> Any:
        return sample(index)

    def __len__(self) -> int:
        return SAMPLES


class Training:
    """Steps on batches while torch's threads are also working."""

    def __init__(self) -> None:
        self.param = torch.nn.Parameter(torch.zeros(SIZE))
        self.optimizer = fusedadam.torch.Adam([self.param])

    def epoch(self, batches: Iterable[Any]) -> None:
        for batch in batches:
            matrix = torch.ones(200, 200)
            assert (matrix @ matrix).sum().item() == 200.0**3
            self.param.grad = batch.mean(0)
            self.optimizer.step()

    def results(self) -> list[Any]:
        """The parameter and its moments, as arrays."""
        state = self.optimizer.state[self.param]
        return [x.detach().numpy() for x in (self.param, state["exp_avg"], state["exp_avg_sq"])]
