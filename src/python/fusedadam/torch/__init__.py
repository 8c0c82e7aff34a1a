# SPDX-License-Identifier: MIT
"""Drop-in replacements for `torch.optim.Adam` and `AdamW` on CPU tensors.

Parameter groups, learning rate schedulers, gradient scalers, hooks, and checkpoints of either
optimizer keep working. Requires torch 2.6 or later.

Examples
--------
>>> import torch
>>> import fusedadam.torch
>>> model = torch.nn.Linear(4, 1)
>>> optimizer = fusedadam.torch.AdamW(model.parameters(), lr=1e-2)
>>> model(torch.ones(2, 4)).sum().backward()
>>> optimizer.step()
"""

from __future__ import annotations

from fusedadam.torch.adam import Adam, AdamW
from fusedadam.torch.attach import Attachment, attach
from fusedadam.torch.split import split_

__all__ = ["Adam", "AdamW", "Attachment", "attach", "split_"]
