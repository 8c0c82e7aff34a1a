# SPDX-License-Identifier: MIT
"""`accelerate.Accelerator` with gradient accumulation, gradient clipping and a schedule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
accelerate: Any = pytest.importorskip("accelerate")

from fusedadam.torch import AdamW
from lockstep import FORMATS, assert_learnt, assert_same_training, beside_torch


class Training:
    def __init__(self, kind: Any, dtype: str = "float32") -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        model.to(getattr(torch, dtype))
        self.inner = kind(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.inner, 0.9)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, self.inner, schedule
        )
        self.losses: list[Any] = []

    def run(self, first: int, last: int) -> Any:
        for i in range(first, last):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
            x = x.to(next(self.model.parameters()).dtype)
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                self.losses.append(loss.detach())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self.inner


def test_prepare() -> None:
    beside_torch(AdamW, lambda kind: Training(kind).run(0, 12))


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_model_learns_and_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = (Training(partial(AdamW, **formats), dtype) for _ in range(2))
    whole.run(0, 20)
    whole.accelerator.save_state(str(tmp_path))
    resumed.accelerator.load_state(str(tmp_path))
    assert_same_training(resumed.run(20, 40), whole.run(20, 40))
    assert_learnt(whole.inner, whole.losses, dtype)
