# SPDX-License-Identifier: MIT
"""`lightning.Trainer`, which passes the training step to `step` as a closure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
lightning: Any = pytest.importorskip("lightning")

from fusedadam.torch import AdamW
from lockstep import FORMATS, assert_learnt, assert_same_training, beside_torch

# Ignore the warnings that clients raise themselves.
pytestmark = pytest.mark.filterwarnings("default")


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        self.layers = torch.nn.Sequential(*layers)
        self.kind = kind
        self.losses: list[Any] = []

    def training_step(self, x: Any) -> Any:
        loss = (self.layers(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(
    kind: Any, directory: Path, epochs: int, *, precision: Any = "32-true", resume: Any = None
) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        logger=False,
        max_epochs=epochs,
        precision=precision,
    )
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    trainer.fit(Model(kind), torch.utils.data.DataLoader(rows, 4), ckpt_path=resume)
    return trainer


def test_fit(tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: fit(kind, tmp_path, 2))


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_model_learns_and_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    precision = "bf16-true" if dtype == "bfloat16" else "32-true"
    run = partial(fit, partial(AdamW, **formats), tmp_path, precision=precision)
    run(8).save_checkpoint(tmp_path / "half.ckpt")
    whole = run(16)
    assert_learnt(whole.optimizers[0], whole.model.losses, dtype)
    resumed = run(16, resume=tmp_path / "half.ckpt")
    assert_same_training(resumed.optimizers[0], whole.optimizers[0])
