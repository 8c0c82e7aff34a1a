# SPDX-License-Identifier: MIT
"""The kernel behind PyTorch's own interface: `torch.optim.Adam` and `AdamW` for CPU tensors.

Change the import, and everything around the optimizer goes on working: parameter groups, learning
rate schedulers, gradient scalers, hooks, checkpoints in both directions. Needs torch 2.6 or later.

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

__all__ = ["Adam", "AdamW", "Attachment", "attach"]
