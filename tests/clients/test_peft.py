# SPDX-License-Identifier: MIT
"""LoRA by `peft`: an optimizer over all parameters, of which the base model's are frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")

from fusedadam.torch import AdamW
from lockstep import FORMATS, assert_learnt, assert_same_training, beside_torch


def base(dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model.to(getattr(torch, dtype))


def adapted(dtype: str = "float32", **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    return peft.get_peft_model(base(dtype), config, **options)


def train(model: Any, optimizer: Any, first: int, last: int, losses: Any = None) -> Any:
    for i in range(first, last):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        x = x.to(next(model.parameters()).dtype)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if losses is not None:
            losses.append(loss.detach())
    return optimizer


def test_lora() -> None:
    def client(kind: Any) -> Any:
        model = adapted()
        return train(model, kind(model.parameters(), lr=0.01), 0, 6), model

    optimizer, model = beside_torch(AdamW, client)
    assert list(optimizer.state) == [p for p in model.parameters() if p.requires_grad]
    frozen = model.unload().state_dict()
    torch.testing.assert_close(frozen, base().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_adapter_learns_and_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    # By default, peft keeps the adapter of a bfloat16 model in float32.
    options: dict[str, Any] = {"autocast_adapter_dtype": False}
    losses: list[Any] = []
    model = adapted(dtype, **options)
    whole = train(model, AdamW(model.parameters(), lr=0.01, **formats), 0, 40, losses)
    assert_learnt(whole, losses, dtype)
    model.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
    restored = peft.PeftModel.from_pretrained(base(dtype), tmp_path, is_trainable=True, **options)
    resumed = AdamW(restored.parameters(), lr=0.01)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for each, optimizer in ((model, whole), (restored, resumed)):
        train(each, optimizer, 40, 50)
    assert_same_training(resumed, whole)
