# SPDX-License-Identifier: MIT
"""`transformers.Trainer` with a given optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from fusedadam.torch import AdamW
from lockstep import beside_torch
from torch_helpers import assert_everything_same_bits, everything

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24 * 8).reshape(24, 8) % 29]


def train(kind: Any, directory: Path, *, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = kind(model.parameters(), lr=0.01)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ROWS, optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return optimizer


def test_trainer(tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: train(kind, tmp_path))


def test_checkpoint_restores(tmp_path: Path) -> None:
    whole = train(AdamW, tmp_path)
    resumed = train(AdamW, tmp_path / "resumed", resume=tmp_path / "checkpoint-3")
    assert_everything_same_bits(everything(resumed), everything(whole))
