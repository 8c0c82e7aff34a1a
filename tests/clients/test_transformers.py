# SPDX-License-Identifier: MIT
"""`transformers.Trainer` with a given optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from fusedadam.torch import AdamW
from lockstep import FORMATS, assert_learnt, assert_same_training, beside_torch

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24 * 8).reshape(24, 8) % 29]


def train(
    kind: Any, directory: Path, *, dtype: str = "float32", resume: Path | None = None
) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    optimizer = kind(model.parameters(), lr=0.01)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        logging_steps=1,
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
    return optimizer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainer(tmp_path: Path) -> None:
    beside_torch(AdamW, lambda kind: train(kind, tmp_path))


@pytest.mark.parametrize(("dtype", "formats"), FORMATS, ids=str)
def test_model_learns_and_restores(dtype: str, formats: dict[str, Any], tmp_path: Path) -> None:
    run = partial(train, partial(AdamW, **formats), dtype=dtype)
    whole, losses = run(tmp_path)
    assert_learnt(whole, losses, dtype)
    resumed, _ = run(tmp_path / "resumed", resume=tmp_path / "checkpoint-3")
    assert_same_training(resumed, whole)
