# SPDX-License-Identifier: MIT
"""DeepSpeed's ZeRO stage 2 with a client optimizer, which steps flat float32 copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
deepspeed: Any = pytest.importorskip("deepspeed")

from fusedadam.torch import AdamW
from lockstep import beside_torch
from torch_helpers import assert_everything_same_bits, everything

# Ignore the warnings that clients raise themselves.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    # Otherwise DeepSpeed first compiles its shared-memory communication for minutes.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=(tmp_path / "store").as_uri(),
        rank=0,
        world_size=1,
    )
    yield
    deepspeed.comm.destroy_process_group()


class Training:
    def __init__(self, kind: Any, dtype: str) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.inner = kind(model.parameters(), lr=0.01)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.inner, config=config)
        self.dtype = getattr(torch, dtype)

    def run(self, first: int, last: int) -> Any:
        for i in range(first, last):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i)).to(self.dtype)
            self.engine.backward((self.engine(x) - x.sum(1, keepdim=True)).square().mean())
            self.engine.step()
        return self.inner


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_2(dtype: str) -> None:
    beside_torch(AdamW, lambda kind: Training(kind, dtype).run(0, 12))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_restores(dtype: str, tmp_path: Path) -> None:
    whole, resumed = Training(AdamW, dtype), Training(AdamW, dtype)
    whole.run(0, 6)
    whole.engine.save_checkpoint(str(tmp_path))
    resumed.engine.load_checkpoint(str(tmp_path))
    assert_everything_same_bits(everything(resumed.run(6, 12)), everything(whole.run(6, 12)))
