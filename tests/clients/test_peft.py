# SPDX-License-Identifier: MIT
"""LoRA by `peft`: an optimizer over all parameters, of which the base model's are frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")

from fusedadam.torch import AdamW
from lockstep import beside_torch
from torch_helpers import assert_everything_same_bits, everything


def base() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def adapted() -> Any:
    return peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "2"]))


def train(model: Any, optimizer: Any, first: int, last: int) -> Any:
    for i in range(first, last):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_lora() -> None:
    def client(kind: Any) -> Any:
        model = adapted()
        return train(model, kind(model.parameters(), lr=0.01), 0, 6), model

    optimizer, model = beside_torch(AdamW, client)
    assert list(optimizer.state) == [p for p in model.parameters() if p.requires_grad]
    frozen = model.unload().state_dict()
    torch.testing.assert_close(frozen, base().state_dict(), rtol=0, atol=0)


def test_adapter_and_state_restore(tmp_path: Path) -> None:
    model = adapted()
    whole = train(model, AdamW(model.parameters(), lr=0.01), 0, 3)
    model.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
    restored = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    resumed = AdamW(restored.parameters(), lr=0.01)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(model, whole, 3, 6)
    train(restored, resumed, 3, 6)
    assert_everything_same_bits(everything(resumed), everything(whole))
