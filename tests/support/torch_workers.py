# SPDX-License-Identifier: MIT
"""Samples for `DataLoader` workers that take steps, in a module that a new process can import."""

from __future__ import annotations

from typing import Any

import fusedadam.torch
import numpy as np
import torch
from fusedadam import Adam

SIZE = 40_000  # more than the 32,768 elements from which a step uses several threads


def steps(index: int) -> Any:
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
    """Six samples."""

    def __getitem__(self, index: int) -> Any:
        return steps(index)

    def __len__(self) -> int:
        return 6
