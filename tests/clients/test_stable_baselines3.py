# SPDX-License-Identifier: MIT
"""`stable_baselines3`, which creates the optimizer from a class in `policy_kwargs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
stable_baselines3: Any = pytest.importorskip("stable_baselines3")

from fusedadam.torch import Adam
from lockstep import beside_torch
from torch_helpers import assert_everything_same_bits, everything


def learn(kind: Any) -> Any:
    model = stable_baselines3.PPO(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={"net_arch": [8], "optimizer_class": kind, "optimizer_kwargs": {"eps": 1e-5}},
        n_steps=32,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
    )
    return model.learn(64)


def test_ppo() -> None:
    beside_torch(Adam, learn)


def test_saved_model_restores(tmp_path: Path) -> None:
    model = learn(Adam)
    model.save(tmp_path / "model")
    restored = stable_baselines3.PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    for each in (model, restored):
        each.set_random_seed(1)
        each.learn(32)
    assert type(restored.policy.optimizer) is Adam
    assert_everything_same_bits(
        everything(restored.policy.optimizer), everything(model.policy.optimizer)
    )
